"""Losses of steps that are not logged yet, saved in checkpoints so that a resumed run logs the same means."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerState

from umbrella_train.hf_compat import losses_since_log, set_losses_since_log

# Not the name of a callback class: Hugging Face's Trainer may rebuild those from their entries.
_NAME = "losses_since_log"
# Whether the checkpoint was saved before the evaluation of its step.
EVALUATION_DUE = "evaluation_due"


def keep_losses(trainer: Trainer) -> None:
    """Adds the sum of losses since the last logged line, averaged over ranks, to trainer_state.json; a collective."""
    total, since = losses_since_log(trainer)
    trainer_state_entries(trainer.state)[_NAME] = {"sum": _mean_over_ranks(total).item(), "since": since}


def restore_losses(trainer: Trainer) -> None:
    """Sets the sum to that of the checkpoint; call it after Hugging Face's Trainer has set its own to zero."""
    kept = trainer_state_entries(trainer.state).get(_NAME)
    if kept is not None:
        set_losses_since_log(trainer, kept["sum"], since=kept["since"])


def _mean_over_ranks(value: Tensor) -> Tensor:
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def trainer_state_entries(state: TrainerState) -> dict[str, Any]:
    """The table in trainer_state.json, saved and restored by Hugging Face's Trainer (which annotates it as a list)."""
    return cast(dict[str, Any], state.stateful_callbacks)
