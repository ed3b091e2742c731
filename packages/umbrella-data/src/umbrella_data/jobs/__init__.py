"""Work over whole manifests: checking, filling the cache, finding the subject behind a pseudonym."""
