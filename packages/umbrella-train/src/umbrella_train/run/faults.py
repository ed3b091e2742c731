"""One message for what can go wrong on a machine, for every rank."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from umbrella_data.errors import UmbrellaDataError
from umbrella_data.files.faults import describe_os_error
from umbrella_train.distributed.rank_watch import RankWatch
from umbrella_train.errors import RunError


def as_run_error(error: Exception, *, folder: Path, watch: RankWatch | None) -> Exception:
    """What to raise for an error that ends a run: with the cause, on every rank.

    Args:
        error: The error.
        folder: Where the run writes.
        watch: Of the ranks; None before there are any.

    Returns:
        A `RunError` with a message for known faults, or if another rank failed first; otherwise the error itself.
    """
    is_lost = is_lost_connection(error)
    first = None if watch is None else watch.failure_of_another(is_lost=is_lost)
    if first is None and is_lost:
        first = "the connection to another rank is lost; the log of that rank says why"
    message = first or describe_fault(error, folder=folder)
    if watch is not None:
        watch.fail(message or f"{type(error).__name__}: {error}")
    is_own = first is None and isinstance(error, (RunError, UmbrellaDataError))
    return error if message is None or is_own else RunError(message)


def describe_fault(error: Exception, *, folder: Path) -> str | None:
    """Which path or process, what is wrong and what to do; None for errors that need their traceback.

    Args:
        error: The error.
        folder: Where the run writes.
    """
    if isinstance(error, (RunError, UmbrellaDataError)):
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    # Safetensors raises a class of its own, with the system's number in the text.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        path = re.search(r'at path "([^"]+)"', str(error))
        error = OSError(int(number[1]), os.strerror(int(number[1])), *([path[1]] if path else []))
    if isinstance(error, OSError):
        return describe_os_error(error, folder=folder)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU has not enough memory ({str(error).partition('. ')[0]}); use a smaller "
            "trainer.per_device_train_batch_size, trainer.gradient_checkpointing, or trainer.engine: fsdp2"
        )
    return _describe_killed_worker(str(error))


def _describe_killed_worker(text: str) -> str | None:
    worker = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)", text)
    if worker is None:
        return None
    if worker[2] == "Bus":
        return (
            f"the data worker {worker[1]} was killed: the shared memory (/dev/shm) is full; give the container or job "
            "more, or set trainer.dataloader_num_workers to 0"
        )
    return (
        f"the data worker {worker[1]} was killed, probably because memory ran out; ask for more memory (SLURM: --mem), "
        "or use fewer trainer.dataloader_num_workers or smaller batches"
    )


def is_lost_connection(error: Exception) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|Connection (closed|reset)", str(error)) is not None
    )
