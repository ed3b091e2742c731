"""Manifests: conversations about scans, validated row by row, with random access and foreign dialects."""
