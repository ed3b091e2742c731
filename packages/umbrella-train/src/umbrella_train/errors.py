"""Errors of runs: `RunError` for the user to fix, `RunStoppedError` for a run that a signal stopped."""

from __future__ import annotations

from pathlib import Path


class RunError(ValueError):
    """A run cannot start or continue: missing checkpoint, other world size, no GPU, ...; shown without traceback."""


class RunStoppedError(Exception):
    """A run that received SIGTERM or Ctrl-C, wrote a checkpoint and ended before its last step.

    Args:
        folder: The run's folder.
        step: Number of completed steps, which the checkpoint has.
        signal_number: The signal; SIGTERM on a rank that received none.
    """

    def __init__(self, folder: Path, *, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}; to continue: --resume auto")
        self.folder = folder
        self.step = step
        self.signal_number = signal_number
