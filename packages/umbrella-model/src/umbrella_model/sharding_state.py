"""Whether a module's parameters are spread over ranks, so that its calls pair up with those of other ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(module: nn.Module) -> bool:
    """True under FSDP2 and DeepSpeed ZeRO-3, whose all-gathers pair by call order over ranks."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return True
    return is_sharded_by_zero(module)


def is_sharded_by_zero(module: nn.Module) -> bool:
    """True under DeepSpeed ZeRO-3, which leaves parameters empty but for the time of their own module's calls."""
    # It marks every partitioned parameter with an id of its own.
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
