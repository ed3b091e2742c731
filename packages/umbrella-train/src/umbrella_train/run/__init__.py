"""A whole run: training, evaluation, pictures."""
