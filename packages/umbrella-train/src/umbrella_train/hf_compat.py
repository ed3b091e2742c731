"""Private names of transformers, accelerate, torch and DeepSpeed that this package uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from transformers.integrations import deepspeed as hf_deepspeed

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def losses_since_log(trainer: Trainer) -> tuple[Tensor, int]:
    """The sum of this rank's losses since the last logged line, 0-dim on the device, and the step of that line."""
    return trainer._tr_loss, trainer._globalstep_last_logged


def set_losses_since_log(trainer: Trainer, total: float, *, since: int) -> None:
    """Sets these, at the begin of a training."""
    trainer._tr_loss.fill_(total)
    trainer._globalstep_last_logged = since
    # The mean training loss, logged at the end, is that of the steps after the resume.
    trainer._total_loss_scalar = -total


def save_checkpoint(trainer: Trainer) -> None:
    """Begins a checkpoint of this step before Hugging Face's Trainer would, which is after an evaluation."""
    assert trainer.model is not None
    trainer._save_checkpoint(trainer.model, None)


def on_device(trainer: Trainer, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch as the trainer passes it to the model."""
    inputs: Mapping[str, Any] = trainer._prepare_inputs(dict(batch))
    return inputs


def leave_step_out_of_means(trainer: Trainer, *, total_before: Tensor) -> None:
    """Takes a step that is about to end out of the logged mean losses, of the next line and of the whole training.

    Args:
        trainer: In the step.
        total_before: The sum of losses before the step, a copy of the first value of `losses_since_log`.
    """
    trainer._tr_loss.copy_(total_before)
    # Hugging Face divides the sums by the number of steps since these.
    trainer._globalstep_last_logged += 1
    trainer._initial_global_step += 1


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


def default_store() -> distributed_c10d.Store:
    """The store over which the ranks of torch.distributed have found each other."""
    return distributed_c10d._get_default_store()


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
