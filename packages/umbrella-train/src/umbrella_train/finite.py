"""Finds the parameter that is not finite, on every rank alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from umbrella_train.errors import RunError
from umbrella_train.gradients import local
from umbrella_train.zero import is_partitioned, partition


class NonFiniteError(RunError):
    """The loss is not finite; the message names the first parameter that is not, if there is one."""


def describe_non_finite(model: nn.Module, *, step: int) -> str:
    """Words for a step whose loss is not finite on some rank; a collective.

    Args:
        model: Not wrapped.
        step: Number of the step that is not taken.
    """
    name = first_non_finite(model)
    if name is not None:
        return f"step {step}: parameter {name} is not finite; no step was taken with it"
    return (
        f"step {step}: the loss is not finite though all parameters are; look at the learning rate, the precision "
        "and the samples of this step"
    )


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with an element that is NaN or infinite on some rank; a collective.

    Args:
        model: Not wrapped; replicated or sharded.

    Returns:
        The name, or None where all are finite.
    """
    named = list(model.named_parameters())
    shards = [partition(each) if is_partitioned(each) else local(each.detach()) for _, each in named]
    bad = torch.stack([(~shard.isfinite()).any() for shard in shards]).int()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    found = bad.cpu().nonzero()
    return named[int(found[0])][0] if len(found) else None
