"""Compares the parameters of the ranks, which differ if a gradient was not reduced."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from umbrella_train.distributed.deepspeed import is_partitioned
from umbrella_train.errors import RunError

# An odd multiplier makes the weights of the sum distinct modulo 2^64, so that exchanged elements change it.
_ODD = 0x9E3779B97F4A7C15 - 2**64
_CHUNK = 1 << 22


class RankParityError(RunError):
    """Parameters differ between ranks; the message names the first."""


def check_rank_parity(model: nn.Module, *, step: int) -> None:
    """Compares a hash of every replicated trainable parameter over all ranks; each rank must call it at the same step.

    Sharded parameters are skipped: each rank has another part of them.

    Raises:
        RankParityError: On every rank, if a parameter differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    named = [
        (name.removeprefix("module."), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor) and not is_partitioned(parameter)
    ]
    if not named:
        return
    hashes = torch.stack([hash_bits(parameter.detach()) for _, parameter in named])
    # One collective for both ends: the smallest of -h is minus the largest h.
    ends = torch.stack([hashes, ~hashes])
    dist.all_reduce(ends, op=dist.ReduceOp.MIN)
    differs = (ends[0] != ~ends[1]).cpu()
    if bool(differs.any()):
        name = named[int(differs.nonzero()[0])][0]
        raise RankParityError(
            f"step {step}: the ranks have different values of {int(differs.sum())} of {len(named)} parameters, the "
            f"first is {name}: its gradient was not reduced. Call the wrapped model, never model.module, compute every "
            "term of the loss from its outputs, and keep absent modalities in the graph (dummy_loss.enabled: true)"
        )


def hash_bits(tensor: Tensor) -> Tensor:
    """A 0-dim int64 hash of a tensor's bits and their positions, computed on its device without a sync."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]
    bits = tensor.contiguous().view(width).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # In chunks: an int64 copy of a large embedding would need more memory than the embedding.
    for number in range(math.ceil(bits.numel() / _CHUNK)):
        chunk = bits[number * _CHUNK : (number + 1) * _CHUNK].to(torch.int64)
        places = torch.arange(number * _CHUNK, number * _CHUNK + chunk.numel(), device=tensor.device)
        total = total + ((chunk + 1) * (places * _ODD | 1)).sum()
    return total
