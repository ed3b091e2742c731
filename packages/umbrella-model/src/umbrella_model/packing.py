"""Padded batches to packed ones: all conversations in one row, without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from umbrella_model.supervision import IGNORE_INDEX, supervised_index

_PACKED = ("input_ids", "attention_mask", "modality_ids", "labels", "supervised_index")
# Of the batch or of the step as a whole: packed or padded, they are the same.
_PASSED_ON = ("pixel_values", "num_items_in_batch")


def pack_batch(batch: Mapping[str, Any], *, supervised_multiple_of: int = 1) -> dict[str, Any]:
    """Lays the conversations of a padded batch end to end; to be called on the CPU, after the collator.

    `cu_seq_lens_*` and `max_length_*` are transformers' own names: `attn_implementation="varlen"` and flash attention
    keep the conversations apart by them, other implementations by `position_ids` and a dense mask.

    Args:
        batch: As of `umbrella_data.PaddingCollator`, padded on either side; a `supervised_index` in it is made anew.
        supervised_multiple_of: The length of `supervised_index` is filled up to a multiple of this.

    Returns:
        `input_ids`, `modality_ids`, `position_ids` and, where given, `labels`, each (1, T); `supervised_index` (K,);
        `cu_seq_lens_q` and `cu_seq_lens_k` (B + 1,) int32; `max_length_q` and `max_length_k`; `pixel_values` and
        `num_items_in_batch` unchanged.

    Raises:
        ValueError: The batch has a key whose packed form is not known.
    """
    unknown = sorted(set(batch) - {*_PACKED, *_PASSED_ON})
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: it is not known how to pack this; a batch holds {', '.join(_PACKED + _PASSED_ON)}"
        )
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
    return packed | {key: batch[key] for key in _PASSED_ON if key in batch}


def check_not_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuses rows of several conversations that nothing tells apart (on a GPU by an asynchronous assertion).

    Args:
        position_ids: Shape (B, L), or None; on packed rows they start anew with each conversation.
        attention_mask: Shape (B, L), or None. One of four axes says itself who sees whom.

    Raises:
        ValueError: Positions fall within a row.
    """
    if position_ids is None or position_ids.ndim != 2 or (attention_mask is not None and attention_mask.ndim != 2):
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        # What positions stand at padding does not matter.
        is_token = attention_mask.bool()
        falls = falls & is_token[:, 1:] & is_token[:, :-1]
    message = "position_ids start anew within a row: packed conversations need cu_seq_lens_q too, as from pack_batch"
    if falls.device.type != "cpu":
        torch._assert_async(~falls.any(), message)
    elif falls.any():
        raise ValueError(message)
