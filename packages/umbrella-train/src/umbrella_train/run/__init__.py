"""A run: training, evaluation, pictures."""
