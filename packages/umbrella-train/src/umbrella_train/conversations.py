"""Which conversation each position of a batch belongs to: a row each where they are padded, one row where packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def num_conversations(batch: Mapping[str, Any]) -> int:
    """The conversations of a batch with labels, padded or packed."""
    ends = batch.get("cu_seq_lens_q")
    return len(batch["labels"]) if ends is None else len(ends) - 1


def conversation_index(batch: Mapping[str, Any]) -> Tensor:
    """The number of the conversation at each position.

    Args:
        batch: From `PaddingCollator`, or packed, still on the host.

    Returns:
        int64 of the shape of `labels`.
    """
    labels, ends = batch["labels"], batch.get("cu_seq_lens_q")
    if ends is None:
        return torch.arange(len(labels)).unsqueeze(1).expand_as(labels)
    return torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()).unsqueeze(0)
