"""Evaluation loss, overall and for each set of modalities, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from umbrella_train.batches.collators import num_conversations
from umbrella_train.distributed.ranks import is_on_some_rank
from umbrella_train.stop_signals import StopSignals
from umbrella_train.trainer.non_finite import NonFiniteSteps


class EvaluationStoppedError(Exception):
    """A signal arrived in the evaluation during a training."""


def evaluation_loss(
    trainer: Trainer,
    dataloader: DataLoader[Any],
    *,
    modalities: Sequence[str],
    signals: StopSignals,
    non_finite: NonFiniteSteps,
    prefix: str,
) -> EvalLoopOutput:
    """Mean loss per supervised token over all ranks, overall and for each set of modalities.

    Only sums are shared, and no logits: ranks, which have as many batches each, may have other shapes and modalities.

    Raises:
        EvaluationStoppedError: On every rank, if a signal arrives in the evaluation during a training.
    """
    assert trainer.model is not None
    model: nn.Module = trainer.model
    if not trainer.is_in_train:
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    device = trainer.args.device
    total = EvaluationLoss(modalities, device=device)
    is_bad: list[Tensor] = []
    for batch in dataloader:
        if trainer.is_in_train and is_on_some_rank(signals.is_asked, device=device):
            raise EvaluationStoppedError
        loss, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
        assert loss is not None
        total.add(loss, {**batch, "labels": batch["labels"].to(device)})
        is_bad.append(~loss.isfinite())
        trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    metrics, num_samples = total.reduce(prefix=prefix)
    if is_bad and not math.isfinite(metrics[f"{prefix}_loss"]):
        non_finite.warn_of_evaluation(model, dataloader, is_bad)
    return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_samples)


class EvaluationLoss:
    """Sums of loss and supervised tokens for every set of modalities, kept on the device.

    Args:
        modalities: The model's modalities in order.
        device: Device of the losses.
    """

    def __init__(self, modalities: Sequence[str], *, device: torch.device) -> None:
        # Every subset has a row on every rank, so that ranks with different sets can be summed.
        self._groups = [group for size in range(len(modalities) + 1) for group in combinations(modalities, size)]
        self._order = tuple(modalities)
        self._sums = torch.zeros(len(self._groups), 3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Adds one batch: its mean loss per token, weighted by its supervised tokens.

        Args:
            loss: 0-dim mean loss of the batch.
            inputs: The batch.
        """
        group = tuple(name for name in self._order if name in inputs["pixel_values"])
        labels = inputs["labels"]
        # The model shifts labels by one: the first position is never predicted.
        tokens = labels[:, 1:].ne(-100).sum().double()
        samples = torch.full_like(tokens, num_conversations(inputs))
        row = torch.stack([loss.double() * tokens, tokens, samples])
        self._sums[self._groups.index(group)] += row

    def reduce(self, *, prefix: str) -> tuple[dict[str, float], int]:
        """Metrics over all ranks, in one collective and one read.

        Args:
            prefix: First word of the keys.

        Returns:
            `{prefix}_loss`, `{prefix}/loss/T1`, `{prefix}/loss/T1+dMRI`, ...; and the number of samples.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        rows = self._sums.tolist()
        losses, tokens, samples = (sum(column) for column in zip(*rows, strict=True))
        metrics = {f"{prefix}_loss": losses / tokens if tokens else float("nan")}
        for group, (group_loss, group_tokens, _) in zip(self._groups, rows, strict=True):
            if group_tokens:
                metrics[f"{prefix}/loss/{'+'.join(group) or 'text'}"] = group_loss / group_tokens
        return metrics, int(samples)
