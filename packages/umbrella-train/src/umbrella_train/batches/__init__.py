"""Collators that training adds to those of umbrella_data."""
