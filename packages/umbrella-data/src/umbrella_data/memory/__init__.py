"""Memory of batches in loader workers."""
