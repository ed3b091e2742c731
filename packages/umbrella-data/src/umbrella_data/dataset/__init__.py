"""Conversations and mixtures of them as map-style data sets, with their samplers."""
