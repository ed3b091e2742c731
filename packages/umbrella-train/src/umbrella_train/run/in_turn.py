"""Several runs by one command, one after the other: the folds of a cross-validation, or stages."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from umbrella_train.config import RunConfig
from umbrella_train.distributed.ranks import is_first_rank, on_first_rank
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.run.training import train
from umbrella_train.run_folder import RunFolder
from umbrella_train.stop_signals import ended_by_signals, find_deadline

logger = logging.getLogger(__name__)


def train_in_turn(
    configs: Sequence[RunConfig],
    *,
    top: Path,
    marks_top: bool,
    resume: str | None,
    allow_changed: Collection[str],
    max_time: float | None,
) -> Path:
    """Trains one run after the other.

    Args:
        configs: The runs, at least one.
        top: The folder of their folders.
        marks_top: Whether `top` gets the mark of a run that its scheduler has interrupted.
        resume: As of `train`.
        allow_changed: As of `train`.
        max_time: As of `train`, for all runs together.

    Returns:
        The folder of the last run.

    Raises:
        RunError: As from `train`.
        RunStoppedError: As from `train`, also if there is no time for another run.
    """
    RunFolder(top).requeue.unlink(missing_ok=True)
    begin, last = time.monotonic(), top
    with ended_by_signals():  # between the runs, which handle signals themselves
        for number, each in enumerate(configs):
            remaining = None if max_time is None else max_time - (time.monotonic() - begin)
            try:
                if number > 0:
                    free_memory()
                    _stop_if_late(each, remaining)
                last = train(each, resume=resume, allow_changed=allow_changed, max_time=remaining) or top
            except RunStoppedError as stopped:
                if marks_top and is_first_rank() and stopped.signal_number != signal.SIGINT:
                    with contextlib.suppress(OSError):
                        RunFolder(top).requeue.touch()  # for scripts that start the command again
                raise
    return last


def free_memory() -> None:
    """Frees the model and the workers of the run before: a trainer is part of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _stop_if_late(config: RunConfig, max_time: float | None) -> None:
    """Stops as at the deadline of a run, if the job has no time for another one.

    Raises:
        RunStoppedError: On every rank.
    """

    def is_late() -> bool:
        try:
            find_deadline(max_time, save_before_seconds=config.trainer.save_before_seconds)
        except RunError as error:
            logger.warning("%s is not started: %s", config.name, error)
            return True
        return False

    if on_first_rank(is_late):
        raise RunStoppedError(None, step=0, signal_number=signal.SIGUSR1)
