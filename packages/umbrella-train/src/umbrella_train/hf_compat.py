"""Private names of transformers, accelerate, torch and DeepSpeed that this package uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations import deepspeed as hf_deepspeed

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "accelerate:Accelerator._is_accelerate_prepared": (),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank": ("param",),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._z3_optimizer": (),
    "torch.optim.lr_scheduler:LRScheduler._last_lr": (),
    "torch:_foreach_mul_": (),
    "torch:_foreach_norm": (),
    "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref": (),
    "transformers:Trainer._clip_grad_norm": ("model",),
    "transformers:Trainer._evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "transformers:Trainer._get_grad_norm": ("model", "grad_norm"),
    "transformers:Trainer._globalstep_last_logged": (),
    "transformers:Trainer._load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "transformers:Trainer._load_optimizer_and_scheduler": ("checkpoint",),
    "transformers:Trainer._load_rng_state": ("checkpoint",),
    "transformers:Trainer._load_scaler": ("checkpoint",),
    "transformers:Trainer._prepare_inputs": ("inputs",),
    "transformers:Trainer._save": ("output_dir", "state_dict"),
    "transformers:Trainer._save_checkpoint": ("model", "trial"),
    "transformers:Trainer._save_optimizer_and_scheduler": ("output_dir",),
    "transformers:Trainer._total_loss_scalar": (),
    "transformers:Trainer._tr_loss": (),
    "transformers:Trainer._train_batch_size": (),
    "transformers:Trainer._wrap_model": ("model", "training", "dataloader"),
    "transformers:TrainingArguments._n_gpu": (),
}
"""`module:name` or `module:Class.name` of each, with the parameters that are relied on.

Those of base classes are used by our subclasses, the others here only.
"""


def losses_since_log(trainer: Trainer) -> tuple[Tensor, int]:
    """The sum of this rank's losses since the last logged line, 0-dim on the device, and the step of that line."""
    return trainer._tr_loss, trainer._globalstep_last_logged


def set_losses_since_log(trainer: Trainer, total: float, *, since: int) -> None:
    """Sets these, at the begin of a training."""
    trainer._tr_loss.fill_(total)
    trainer._globalstep_last_logged = since
    # The mean training loss, logged at the end, is that of the steps after the resume.
    trainer._total_loss_scalar = -total


def keep_one_device(arguments: TrainingArguments) -> None:
    """Makes Hugging Face's Trainer use one of the GPUs that this process sees."""
    arguments._n_gpu = 1


def mark_as_prepared(model: Any) -> None:
    """Makes accelerate leave a model as it is."""
    model._is_accelerate_prepared = True


def set_last_rates(scheduler: Any, rates: Sequence[float | Tensor]) -> None:
    """Sets what `get_last_lr` of a scheduler of torch returns."""
    scheduler._last_lr = rates


def vector_norms(tensors: list[Tensor], *, dtype: torch.dtype) -> Sequence[Tensor]:
    """The L2 norm of each tensor, 0-dim, in one fused call."""
    return torch._foreach_norm(tensors, 2, dtype=dtype)


def multiply(tensors: list[Tensor], factor: float) -> None:
    """Multiplies tensors in place in one fused call."""
    torch._foreach_mul_(tensors, factor)


def partition_rank(parameter: nn.Parameter) -> int:
    """This rank among those that DeepSpeed ZeRO-3 partitions a parameter over; 0 before the model is wrapped."""
    optimizer: Any = getattr(parameter, "_z3_optimizer", None)
    return 0 if optimizer is None else int(optimizer._get_param_partition_rank(parameter))


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Transformers does not know of DeepSpeed in this context."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept
