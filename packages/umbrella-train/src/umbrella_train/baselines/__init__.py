"""Simple models trained and tested on the rows of a run, to compare its scores with."""
