"""Supervised positions: logits are computed only where a label exists, which saves memory with large vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
NO_POSITION = -1


def supervised_index(labels: Tensor, *, multiple_of: int = 1) -> Tensor:
    """Positions whose next token has a label; to be called on the CPU, as in a collator.

    Counting them on a GPU would need a synchronisation.

    Args:
        labels: Shape (B, L), -100 at positions without loss.
        multiple_of: The length is padded to a multiple of this with -1, so that compiled code sees few lengths.

    Returns:
        int64 of shape (K,): positions in the flattened (B * L), in order.
    """
    positions = (shift_labels(labels).flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return F.pad(positions, (0, -len(positions) % multiple_of), value=NO_POSITION)


def shift_labels(labels: Tensor) -> Tensor:
    """The label of the next position at each position, shape (B, L); -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def gather_supervised(hidden_states: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and target tokens at supervised positions, without a device synchronisation.

    Args:
        hidden_states: Shape (B, L, H).
        labels: Shape (B, L).
        index: From `supervised_index`, shape (K,).

    Returns:
        Hidden states of shape (K, H) and targets of shape (K,), -100 where `index` is -1.
    """
    valid_index = index.clamp(min=0)
    targets = shift_labels(labels).flatten().index_select(0, valid_index)
    targets = torch.where(index == NO_POSITION, IGNORE_INDEX, targets)
    return hidden_states.flatten(0, 1).index_select(0, valid_index), targets
