"""DeepSpeed ZeRO: access to partitioned parameters and gradients, and a hook before its optimizer step.

DeepSpeed keeps gradients in its own partitions (`parameter.grad` is None), steps inside `accelerator.backward`, and at
stage 3 a parameter is empty except during its module's forward and backward. DeepSpeed is imported only if a run uses
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from umbrella_train.hf_compat import partition_rank, without_deepspeed


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps this parameter in partitions."""
    return hasattr(parameter, "ds_id")


def partition(parameter: nn.Parameter) -> Tensor:
    """This rank's elements of a parameter of ZeRO-3, shape (n,), without padding."""
    shard: Any = parameter
    size, whole = shard.ds_tensor.ds_numel, shard.ds_numel
    begin = size * partition_rank(parameter)
    own: Tensor = shard.ds_tensor.detach().flatten()
    return own[: max(0, min(size, whole - begin))]


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    count: int = getattr(parameter, "ds_numel", parameter.numel())
    return count


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The complete reduced gradient before the optimizer step; a collective that every rank must call."""
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter)
    return gradient


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """The complete float32 weights that DeepSpeed steps; a collective that every rank must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: Tensor = safe_get_full_fp32_param(parameter)
    return weights.detach()


def call_before_step(engine: Any, action: Callable[[], None]) -> None:
    """Makes a DeepSpeed engine call `action` before each optimizer step; set once per engine."""
    if "step" in vars(engine):
        return
    step = engine.step

    def step_after_action(*args: Any, **kwargs: Any) -> Any:
        action()
        return step(*args, **kwargs)

    engine.step = step_after_action


# Models built in this context are complete on every rank; DeepSpeed partitions them when it wraps them. Under ZeRO-3
# transformers partitions whatever `from_config` or `from_pretrained` builds, also parts of a model under construction,
# whose weights could then not be initialised.
built_whole = without_deepspeed
