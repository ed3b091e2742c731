"""Padded batches to packed ones: all conversations in one row, without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from umbrella_model.supervision import IGNORE_INDEX, supervised_index


def pack_batch(batch: Mapping[str, Any], *, supervised_multiple_of: int = 1) -> dict[str, Any]:
    """Lays the conversations of a padded batch end to end; to be called on the CPU, after the collator.

    `cu_seq_lens_*` and `max_length_*` are transformers' own names: `attn_implementation="varlen"` and flash attention
    keep the conversations apart by them, other implementations by `position_ids` and a dense mask.

    Args:
        batch: As of `umbrella_data.PaddingCollator`, padded on either side.
        supervised_multiple_of: The length of `supervised_index` is filled up to a multiple of this.

    Returns:
        `input_ids`, `modality_ids`, `position_ids` and, where given, `labels`, each (1, T); `supervised_index` (K,);
        `cu_seq_lens_q` and `cu_seq_lens_k` (B + 1,) int32; `max_length_q` and `max_length_k`; `pixel_values` unchanged.
    """
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    packed: dict[str, Any] = {
        key: batch[key][mask].unsqueeze(0) for key in ("input_ids", "modality_ids") if key in batch
    }
    packed["position_ids"] = (mask.cumsum(dim=1) - 1)[mask].unsqueeze(0)
    if "labels" in batch:
        # No token follows the last one of a conversation: the next one's first is not its continuation.
        starts = packed["position_ids"] == 0
        packed["labels"] = batch["labels"][mask].unsqueeze(0).masked_fill(starts, IGNORE_INDEX)
        packed["supervised_index"] = supervised_index(packed["labels"], multiple_of=supervised_multiple_of)
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed["max_length_q"] = packed["max_length_k"] = int(lengths.max())
    if "pixel_values" in batch:
        packed["pixel_values"] = batch["pixel_values"]
    return packed
