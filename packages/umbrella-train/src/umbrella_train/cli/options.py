"""What the arguments of several commands share."""

from __future__ import annotations

import argparse

DATA_ROOT_HELP = "the folder that paths in the manifests are relative to (default: each manifest's own)"
"""Help of `--data-root`."""


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return number
