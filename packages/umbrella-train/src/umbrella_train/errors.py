"""Errors of a run: `RunError` for wrong settings or inputs, `RunStoppedError` for a run stopped by a signal."""

from __future__ import annotations

from pathlib import Path


class RunError(ValueError):
    """Shown by the commands as one message without a traceback: wrong world size, missing checkpoint, no GPU, ..."""


class RunStoppedError(Exception):
    """A run that received SIGTERM or Ctrl-C, wrote a checkpoint and ended before its last step.

    Args:
        folder: The run's folder.
        step: Number of completed steps, which the checkpoint has.
        signal_number: The signal; SIGTERM on a rank that received none.
    """

    def __init__(self, folder: Path, *, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}; resume with: --resume auto")
        self.folder = folder
        self.step = step
        self.signal_number = signal_number
