"""Rows of a manifest: schema, dialects, random access."""
