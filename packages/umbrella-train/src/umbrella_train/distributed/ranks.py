"""Work that only the first rank does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umbrella_data.errors import UmbrellaDataError
from umbrella_train.errors import RunError

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this is the first rank, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_on_some_rank(value: bool, *, device: torch.device) -> bool:
    """Whether a value is true on some rank; a collective if there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(float(value), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def from_all_ranks(values: list[T]) -> list[T]:
    """The values of all ranks, in the order of the ranks; a collective if there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    shared: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shared, values)
    return [value for part in shared for value in part]


def on_first_rank(function: Callable[[], T]) -> T:
    """Calls a function on the first rank only; every rank gets its result, or its error; a collective."""
    if not dist.is_initialized():
        return function()
    shared: list[Any] = [None]
    if is_first_rank():
        try:
            shared = [function()]
        except (RunError, UmbrellaDataError, OSError) as error:
            shared = [error]
    dist.broadcast_object_list(shared)
    if isinstance(shared[0], Exception):
        raise shared[0]
    result: T = shared[0]
    return result
