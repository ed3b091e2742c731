"""Merges neighbouring tokens of a volume, so that a long series costs the language model less."""

from __future__ import annotations

from itertools import chain

from torch import Tensor

from umbrella_model.config import PatchEmbedConfig


def pool_tokens(tokens: Tensor, config: PatchEmbedConfig) -> Tensor:
    """Averages blocks of neighbouring tokens.

    An average needs no parameters: nothing more is pretrained, or left without a gradient when a modality is absent.

    Args:
        tokens: Shape (N, num_patches, hidden_size), the last axis of the grid fastest.
        config: Grid and pool sizes of the modality.

    Returns:
        Shape (N, num_tokens, hidden_size), in the same order.
    """
    if config.num_tokens == config.num_patches:
        return tokens
    blocks = [(grid // pool, pool) for grid, pool in zip(config.grid_size, config.pool_size, strict=True)]
    folded = tokens.reshape(len(tokens), *chain.from_iterable(blocks), tokens.shape[-1])
    return folded.mean(dim=tuple(range(2, 2 + 2 * len(blocks), 2))).flatten(1, -2)
