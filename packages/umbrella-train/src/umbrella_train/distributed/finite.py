"""Finds parameters and gradients that are not finite, with the same result on every rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umbrella_train.distributed.tensors import local, local_elements
from umbrella_train.errors import RunError


class NonFiniteError(RunError):
    """A loss, a gradient or a parameter is not finite; the message names the first one."""


def describe_non_finite(model: nn.Module, *, step: int, is_loss_finite: bool) -> str:
    """The message for a step whose loss or gradient is not finite on some rank; a collective.

    Args:
        model: Not wrapped.
        step: Number of the step that is not taken.
        is_loss_finite: Whether the loss is finite.

    Raises:
        NonFiniteError: A parameter is not finite: no step can be taken any more.
    """
    name = first_non_finite(model)
    if name is not None:
        raise NonFiniteError(f"step {step}: parameter {name} is not finite; the step was not taken")
    name = _first_bad_gradient(model)
    what = (
        "the loss" if not is_loss_finite else "the norm of all gradients" if name is None else f"the gradient of {name}"
    )
    return (
        f"step {step}: {what} is not finite although all parameters are; check the learning rate, the precision and "
        "the samples of this step"
    )


def has_bad_gradient(model: nn.Module) -> Tensor | None:
    """Whether some gradient of this rank, or the norm of all, is not finite; without a device sync.

    Args:
        model: Not wrapped; replicated or sharded.

    Returns:
        A 0-dim tensor on the device; None without gradients (DeepSpeed does not expose them).
    """
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return None
    # The fastest pass over them, and the one of clipping. Where it overflows (1.8e19), clipping would set all gradients
    # to zero.
    return ~nn.utils.get_total_norm(gradients).isfinite()


def check_finite(model: nn.Module, *, step: int) -> None:
    """Rejects a model that is not finite before it is saved; a collective.

    Args:
        model: Not wrapped; replicated or sharded.
        step: Steps done.

    Raises:
        NonFiniteError: On every rank, with the name of the first parameter.
    """
    name = first_non_finite(model)
    if name is not None:
        raise NonFiniteError(f"after step {step}: parameter {name} is not finite; nothing is saved")


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with an element that is NaN or infinite on some rank; a collective.

    Args:
        model: Not wrapped; replicated or sharded.

    Returns:
        The name, or None if all are finite.
    """
    return _first_bad((name, local_elements(parameter)) for name, parameter in model.named_parameters())


def _first_bad_gradient(model: nn.Module) -> str | None:
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return _first_bad((name, None if gradient is None else local(gradient)) for name, gradient in gradients)


def _first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Name of the first tensor that is not finite on some rank; all ranks name the same tensors."""
    names, shards = zip(*named, strict=True)
    device = next((shard.device for shard in shards if shard is not None), torch.device("cpu"))
    norms = [torch.zeros((), device=device) if shard is None else torch.linalg.vector_norm(shard) for shard in shards]
    # Norms are fast but may overflow: elements are checked only where a norm is not finite.
    suspects = torch.stack([norm.double() for norm in norms]).isfinite().logical_not().tolist()
    is_bad = [
        is_suspect and not bool(shard.isfinite().all()) for is_suspect, shard in zip(suspects, shards, strict=True)
    ]
    bad = torch.tensor(is_bad, dtype=torch.int32, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    found = bad.cpu().nonzero()
    return str(names[int(found[0])]) if len(found) else None
