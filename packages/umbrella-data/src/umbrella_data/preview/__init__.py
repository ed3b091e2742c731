"""Pictures of scans as the model sees them."""
