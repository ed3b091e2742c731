"""Processes many files in several processes, in any order, with few in flight at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Starting a process takes longer than reading a few files.
_FEW = 8
_IN_FLIGHT = 4


def default_workers() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def map_unordered(
    work: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int | None = None
) -> Iterator[Result]:
    """Results in the order of completion.

    Args:
        work: A picklable function, such as `functools.partial` of a module's function.
        items: Any number; only a few per process are taken at a time.
        num_workers: Processes; 1, or few items, run in this process. None takes the number of cores.
    """
    workers = default_workers() if num_workers is None else max(1, num_workers)
    waiting = iter(items)
    first = list(islice(waiting, _FEW)) if workers > 1 else []
    if workers == 1 or len(first) < _FEW:
        yield from map(work, [*first, *waiting])
        return
    # spawn: a forked child of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_use_one_thread) as pool:
        running: set[Future[Result]] = {pool.submit(work, item) for item in first}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {
                pool.submit(work, item) for item in islice(waiting, max(0, workers * _IN_FLIGHT - len(running)))
            }
            for future in done:
                yield future.result()


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
