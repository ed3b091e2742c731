"""Map-style data sets of conversations, mixtures of them, and their batch sampler."""
