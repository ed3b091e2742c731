"""Puts vision tokens where the modality tags say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def splice_features(
    inputs_embeds: Tensor, features: Mapping[str, Tensor], modality_ids: Tensor, *, modality_order: Sequence[str]
) -> Tensor:
    """Replaces the embeddings at tagged positions by vision features, in reading order.

    Args:
        inputs_embeds: Shape (B, L, H).
        features: For each modality present, shape (N_m, tokens, H): its scans in the order of their runs in the batch.
        modality_ids: Shape (B, L); 0 is text, i+1 the i-th entry of `modality_order`.
        modality_order: Names of the modalities by tag.

    Returns:
        Shape (B, L, H).

    Raises:
        ValueError: Positions and features of a modality differ in number (checked on the CPU; on a GPU an asynchronous
            assertion takes its place, because reading a count would stall the device).
    """
    tags = modality_ids.flatten()
    positions, tokens = [], []
    for tag, name in enumerate(modality_order, start=1):
        mask = tags == tag
        modality_features = features.get(name)
        num_features = 0 if modality_features is None else modality_features.shape[0] * modality_features.shape[1]
        _check_count(mask, num_features, name)
        if modality_features is not None:
            # The number of positions is known from the features: the device is not asked, and nor is it in backward
            # (masked_scatter would).
            positions.append(torch.nonzero_static(mask, size=num_features).squeeze(1))
            tokens.append(modality_features.flatten(0, 1))
    if not tokens:
        return inputs_embeds
    flat = torch.cat(tokens).to(inputs_embeds.dtype)
    return inputs_embeds.flatten(0, 1).index_copy(0, torch.cat(positions), flat).view_as(inputs_embeds)


def _check_count(mask: Tensor, num_features: int, name: str) -> None:
    if mask.device.type != "cpu":
        torch._assert_async(mask.sum() == num_features, f"{name}: tagged positions and vision tokens differ in number")
        return
    num_positions = int(mask.sum())
    if num_positions != num_features:
        raise ValueError(
            f"{name}: the batch has {num_positions} positions tagged {name} but {num_features} vision tokens; "
            "each scan in pixel_values must own exactly num_image_tokens positions in modality_ids"
        )
