"""Checkpoints: integrity, finding the one to resume from, training state."""
