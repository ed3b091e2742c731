"""Shared-memory buffers for batches of loader workers."""
