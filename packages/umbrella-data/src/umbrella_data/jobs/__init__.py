"""Work over whole manifests: checking them, and filling the cache."""
