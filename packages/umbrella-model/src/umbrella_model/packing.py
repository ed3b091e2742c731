"""Packing: all conversations of a batch in one row, without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from umbrella_model.hf_compat import require
from umbrella_model.supervision import IGNORE_INDEX, supervised_index

_PACKED = ("input_ids", "attention_mask", "modality_ids", "labels", "supervised_index")
# Keys that do not depend on packing.
_UNCHANGED = ("pixel_values", "num_items_in_batch")


def pack_batch(batch: Mapping[str, Any], *, supervised_multiple_of: int = 1) -> dict[str, Any]:
    """Concatenates the conversations of a padded batch to one row; to be called on the CPU, after the collator.

    `cu_seq_lens_*` and `max_length_*` are transformers' names. `attn_implementation="varlen"` and flash attention use
    them to separate the conversations; other implementations use `position_ids` and a dense mask.

    Args:
        batch: As from `umbrella_data.PaddingCollator`, padded on either side; its `supervised_index` is recomputed.
        supervised_multiple_of: The length of `supervised_index` is padded to a multiple of this.

    Returns:
        `input_ids`, `modality_ids`, `position_ids` and, if given, `labels`, each (1, T); `supervised_index` (K,);
        `cu_seq_lens_q` and `cu_seq_lens_k` (B + 1,) int32; `max_length_q` and `max_length_k`; `pixel_values` and
        `num_items_in_batch` unchanged.

    Raises:
        ValueError: The batch has a key that cannot be packed.
    """
    unknown = sorted(set(batch) - {*_PACKED, *_UNCHANGED})
    if unknown:
        raise ValueError(
            f"pack_batch does not support the keys {', '.join(unknown)}; a batch can have "
            f"{', '.join(_PACKED + _UNCHANGED)}"
        )
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    packed: dict[str, Any] = {
        key: batch[key][mask].unsqueeze(0) for key in ("input_ids", "modality_ids") if key in batch
    }
    packed["position_ids"] = (mask.cumsum(dim=1) - 1)[mask].unsqueeze(0)
    if "labels" in batch:
        # The first token of a conversation does not follow from the last one of the previous conversation.
        starts = packed["position_ids"] == 0
        packed["labels"] = batch["labels"][mask].unsqueeze(0).masked_fill(starts, IGNORE_INDEX)
        packed["supervised_index"] = supervised_index(packed["labels"], multiple_of=supervised_multiple_of)
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed["max_length_q"] = packed["max_length_k"] = int(lengths.max())
    return packed | {key: batch[key] for key in _UNCHANGED if key in batch}


@torch.no_grad()
def check_supports_packing(model: Any) -> None:
    """Rejects a language model in which packed conversations see each other, as in the layers of state-space models.

    It is tried on a few tokens; on the CPU, before the model is wrapped.

    Args:
        model: An `UmbrellaForConditionalGeneration`.

    Raises:
        ValueError: With the name of the language model.
    """
    was_training = model.training
    model.eval()
    # The ids are below those of image tokens and of padding in any tokenizer that has words.
    rows = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    try:
        packed = model(**pack_batch({"input_ids": rows, "attention_mask": mask})).logits[0]
        alone = torch.cat([model(input_ids=row.unsqueeze(0)).logits[0] for row in (rows[0], rows[1, :3])])
        is_same = torch.allclose(packed, alone, atol=1e-3 * float(alone.abs().max()), rtol=1e-3)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{_language_model(model)} does not support packed conversations: {error}") from error
    finally:
        model.train(was_training)
    if not is_same:
        raise ValueError(
            f"{_language_model(model)} mixes the conversations of a packed row, as the recurrent layers of state-space "
            "models do; train on padded batches (data.packing: false)"
        )


def _language_model(model: Any) -> str:
    return f"language model {model.config.text_config.model_type}"


def check_not_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Rejects packed rows without sequence boundaries (on a GPU with an asynchronous assertion).

    Args:
        position_ids: Shape (B, L), or None; in packed rows they restart with each conversation.
        attention_mask: Shape (B, L), or None. A mask of four axes separates the conversations itself.

    Raises:
        ValueError: Positions decrease within a row.
    """
    if position_ids is None or position_ids.ndim != 2 or (attention_mask is not None and attention_mask.ndim != 2):
        return
    decreases = position_ids[:, 1:] < position_ids[:, :-1]
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        # Positions of padding are irrelevant.
        is_token = attention_mask.bool()
        decreases = decreases & is_token[:, 1:] & is_token[:, :-1]
    require(
        ~decreases.any(),
        "position_ids restart within a row, but cu_seq_lens_q is missing; pass a packed batch from pack_batch",
    )
