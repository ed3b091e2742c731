"""The evaluation loss, in all and for each set of modalities, summed over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from umbrella_train.conversations import num_conversations


class EvaluationLoss:
    """Sums of loss and supervised tokens for every set of modalities, on the device until the end.

    Args:
        modalities: The model's modalities in order.
        device: Where the losses live.
    """

    def __init__(self, modalities: Sequence[str], *, device: torch.device) -> None:
        # Every subset has a row on every rank: the ranks need not have met the same ones to add up.
        self._groups = [group for size in range(len(modalities) + 1) for group in combinations(modalities, size)]
        self._order = tuple(modalities)
        self._sums = torch.zeros(len(self._groups), 3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Adds one batch: its mean loss a token, weighted by its supervised tokens.

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
