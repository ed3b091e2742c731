"""The loss of each sample of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from umbrella_model import supervised_index
from umbrella_model.supervision import shift_labels
from umbrella_train.batches.collators import conversation_index, num_conversations


@torch.no_grad()
def sample_losses(model: nn.Module, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[float]:
    """The mean loss of each conversation of a batch over its supervised tokens, in one forward pass.

    Args:
        model: In training or evaluation mode.
        batch: Padded or packed, on the host.
        inputs: The same on the model's device.

    Returns:
        One number per conversation; 0 without supervised tokens.
    """
    labels = batch["labels"]
    positions = supervised_index(labels)
    owners = conversation_index(batch).flatten()[positions]
    device = inputs["labels"].device
    outputs = model(**{**inputs, "supervised_index": positions.to(device)})
    targets = shift_labels(labels).flatten()[positions].to(device)
    losses = F.cross_entropy(outputs.supervised_logits.float(), targets, reduction="none").double().cpu()
    sums = torch.zeros(num_conversations(batch), dtype=torch.float64).index_add(0, owners, losses)
    means: list[float] = (sums / owners.bincount(minlength=len(sums)).clamp(min=1)).tolist()
    return means
