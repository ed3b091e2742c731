"""Finds the parameter that is not finite, on every rank alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from umbrella_train.gradients import local


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with an element that is NaN or infinite on some rank; a collective.

    Args:
        model: Not wrapped; replicated or sharded.

    Returns:
        The name, or None where all are finite.
    """
    named = list(model.named_parameters())
    bad = torch.stack([(~local(parameter.detach()).isfinite()).any() for _, parameter in named]).int()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    found = bad.cpu().nonzero()
    return named[int(found[0])][0] if len(found) else None
