"""What the log says of each patch embed: its gradient norm, its share of the total norm, and its drift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.distributed.ranks import is_first_rank
from umbrella_train.dummy_loss.drift_monitor import DriftWatch
from umbrella_train.dummy_loss.patch_embed_gradients import PatchEmbedGradients
from umbrella_train.trainer.accumulation import WindowFacts


class PatchEmbedLog(TrainerCallback):
    """Keeps the gradient norms of a step until they are logged, and the drift.

    Attributes:
        gradients: Those of all patch embeds, which DeepSpeed partitions if `under_zero`.
        drift: Of absent modalities, measured from the start of a training.
    """

    drift: DriftWatch

    def __init__(self, tower: UmbrellaVisionTower, *, under_zero: bool) -> None:
        self._tower = tower
        self._under_zero = under_zero
        self.gradients = PatchEmbedGradients(tower, under_zero=under_zero)
        self._norms: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer; the weights are loaded, and on their devices."""
        self.drift = DriftWatch(self._tower, under_zero=self._under_zero)

    @staticmethod
    def is_needed(args: TrainingArguments, state: TrainerState) -> bool:
        """Whether a line is logged after the next step; with one per epoch, any step may be the last before it."""
        if args.logging_strategy == "epoch" or (args.logging_first_step and not state.global_step):
            return True
        return (state.global_step + 1) % state.logging_steps == 0

    def squared_norms(self) -> Tensor:
        """This rank's share of the squared gradient norms, to be summed over ranks."""
        norms = self.gradients.squared_norms()
        # Replicated gradients are equal on all ranks: only one rank contributes, so that the sum is exact.
        return norms if is_first_rank() or self.gradients.is_sharded else torch.zeros_like(norms)

    def keep(self, facts: WindowFacts, *, factors: Mapping[str, float], scaler: Any) -> None:
        """Keeps the norms of a step, from the sums of `squared_norms` over ranks in `facts`.

        Since then, gradients of modalities were multiplied by `factors`; they still have the scale of the loss scaler.
        """
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        squares = self.gradients.add_up(facts.norms)
        self._norms = {}
        for index, modality in enumerate(self.gradients.modalities):
            keys = self.gradients.keys(modality, is_active=modality in facts.present)
            for key, square in zip(keys, squares[2 * index : 2 * index + 2], strict=True):
                self._norms[key] = math.sqrt(square) / scale * factors.get(modality, 1.0)

    def take(self, total: float, *, step: int) -> dict[str, float]:
        """The entries of a logged line after `step` steps, with shares of the total norm if that is known (above 0).

        Empty if no norms were kept since the last line.
        """
        if not self._norms:
            return {}
        entries, self._norms = self._norms, {}
        if total > 0:
            shares = {key.replace("grad/", "grad_share/", 1): norm / total for key, norm in entries.items()}
            entries |= {key: share for key, share in shares.items() if not key.endswith(".proj")}
        return entries | self.drift.measure(step=step)
