"""Errors of a run: `RunError` for wrong settings or inputs, `RunStoppedError` for a run stopped by a signal."""

from __future__ import annotations

import signal
from pathlib import Path


class RunError(ValueError):
    """Shown by the commands as one message without a traceback: wrong world size, missing checkpoint, no GPU, ..."""


class RunStoppedError(Exception):
    """A run that was stopped by a signal or at its deadline.

    Args:
        folder: The run's folder; None if it had none yet.
        step: Number of completed steps, which its newest checkpoint has; 0: there was nothing to save.
        signal_number: The signal; SIGTERM on a rank that received none, SIGUSR1 for the deadline.
    """

    def __init__(self, folder: Path | None, *, step: int, signal_number: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped after step {step} ({name}); resume with: --resume auto"
            if step
            else f"stopped before the first step ({name}): there is nothing to save"
        )
        self.folder = folder
        self.step = step
        self.signal_number = signal_number
