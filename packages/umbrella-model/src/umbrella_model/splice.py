"""Places vision tokens at the positions given by the modality tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from umbrella_model.hf_compat import require


def splice_features(
    inputs_embeds: Tensor, features: Mapping[str, Tensor], modality_ids: Tensor, *, modality_order: Sequence[str]
) -> Tensor:
    """Replaces the embeddings at tagged positions with vision features, in reading order.

    Args:
        inputs_embeds: Shape (B, L, H).
        features: For each modality present, shape (N_m, tokens, H): its scans in the order of their runs in the batch.
        modality_ids: Shape (B, L); 0 is text, i+1 the i-th entry of `modality_order`.
        modality_order: Names of the modalities by tag.

    Returns:
        Shape (B, L, H).

    Raises:
        ValueError: Positions and features of a modality differ in number (on a GPU an asynchronous assertion, because
            reading a count would synchronise), or a tag has no modality (checked on the CPU only).
    """
    tags = modality_ids.flatten()
    if tags.device.type == "cpu":
        num_unknown = int(((tags < 0) | (tags > len(modality_order))).sum())
        if num_unknown:
            raise ValueError(
                f"modality_ids has an unknown tag at {num_unknown} positions; 0 is text, "
                f"{', '.join(f'{tag} is {name}' for tag, name in enumerate(modality_order, start=1))}"
            )
    positions, tokens = [], []
    for tag, name in enumerate(modality_order, start=1):
        mask = tags == tag
        modality_features = features.get(name)
        num_features = 0 if modality_features is None else modality_features.shape[0] * modality_features.shape[1]
        _check_count(mask, num_features, name)
        if modality_features is not None:
            # The number of positions is known from the features, so that neither forward nor backward synchronises
            # (masked_scatter would).
            positions.append(torch.nonzero_static(mask, size=num_features).squeeze(1))
            tokens.append(modality_features.flatten(0, 1))
    if not tokens:
        return inputs_embeds
    flat = torch.cat(tokens).to(inputs_embeds.dtype)
    return inputs_embeds.flatten(0, 1).index_copy(0, torch.cat(positions), flat).view_as(inputs_embeds)


def check_image_tokens(input_ids: Tensor, modality_ids: Tensor | None, *, image_token_id: int) -> None:
    """Checks that image tokens and tags are at the same positions; on the CPU only, since it reads the tensors.

    Args:
        input_ids: Shape (B, L).
        modality_ids: Shape (B, L), or None for text only.
        image_token_id: The token of `input_ids` at the positions of scans.

    Raises:
        ValueError: An image token has no tag, or another token has one.
    """
    if input_ids.device.type != "cpu" or (modality_ids is not None and modality_ids.device.type != "cpu"):
        return
    is_image = input_ids == image_token_id
    is_tagged = torch.zeros_like(is_image) if modality_ids is None else modality_ids != 0
    num_untagged, num_words = int((is_image & ~is_tagged).sum()), int((is_tagged & ~is_image).sum())
    if num_untagged or num_words:
        raise ValueError(
            f"input_ids and modality_ids do not match: {num_untagged} of {int(is_image.sum())} image tokens "
            f"({image_token_id}) have no tag, and {num_words} of {int(is_tagged.sum())} tags are at other tokens; "
            "each position of a scan needs both"
        )


def _check_count(mask: Tensor, num_features: int, name: str) -> None:
    if mask.device.type != "cpu":
        require(mask.sum() == num_features, f"{name}: numbers of tagged positions and vision tokens differ")
        return
    num_positions = int(mask.sum())
    if num_positions != num_features:
        raise ValueError(
            f"{name}: the batch has {num_positions} positions tagged {name} but {num_features} vision tokens; "
            "each scan in pixel_values needs exactly num_image_tokens positions in modality_ids"
        )
