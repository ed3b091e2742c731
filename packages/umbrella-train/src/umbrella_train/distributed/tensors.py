"""Tensors sharded over ranks: this rank's shard, the full tensor, and a full tensor sharded like another."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from umbrella_train.distributed.deepspeed import is_partitioned, partition


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_elements(parameter: nn.Parameter) -> Tensor:
    """This rank's elements of a parameter, under any engine; detached."""
    return partition(parameter) if is_partitioned(parameter) else local(parameter.detach())


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """A full tensor, equal on every rank, on the device of another tensor and sharded like it."""
    if not isinstance(target, DTensor):
        return value.to(target.device)
    # Without a source rank each rank takes its shard from its own copy; nothing is sent.
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
