"""Initialisation of 3-D and 4-D patch embeds from the 2-D patch filter and positions of a pretrained vision encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from umbrella_model.patch_embed import PatchEmbed
from umbrella_model.positions import interpolate_position_embedding, sincos_position_embedding


@torch.no_grad()
def inflate_patch_embed(patch_embed: PatchEmbed, *, embeddings: Any) -> None:
    """Initialises a patch embed from a Hugging Face vision encoder's 2-D embeddings.

    Image rows become X, columns Y. If a patch is as deep as the volume and has the 2-D encoder's size in the plane, a
    volume that repeats a grey image along Z (and T and the channels) gets the 2-D encoder's patch features.

    Args:
        patch_embed: The patch embed to fill.
        embeddings: The encoder's embeddings, with `patch_embedding` (a Conv2d) and `position_embedding`.
    """
    conv, config = embeddings.patch_embedding, patch_embed.config
    weight = inflate_filter(conv.weight, patch_size=config.patch_size, in_channels=config.in_channels)
    patch_embed.proj.weight.copy_(weight.flatten(1))
    if conv.bias is None:
        patch_embed.proj.bias.zero_()
    else:
        patch_embed.proj.bias.copy_(conv.bias)
    table = inflate_positions(embeddings.position_embedding.weight, grid_size=config.grid_size)
    patch_embed.position_embedding.copy_(table)


def inflate_filter(weight: Tensor, *, patch_size: tuple[int, ...], in_channels: int) -> Tensor:
    """Spreads a 2-D patch filter over depth and time (Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?").

    The colour channels are summed to a grey filter, resized in the plane if sizes differ, and distributed evenly over
    the channels and the third and fourth axes, so that the response to an image repeated along them is unchanged.

    Args:
        weight: Shape (hidden_size, colours, rows, columns).
        patch_size: Voxels along X, Y, Z[, T].
        in_channels: Channels of the volume.

    Returns:
        float64, shape (hidden_size, in_channels, *patch_size).
    """
    grey = resize_filter(weight.double().sum(dim=1), size=(patch_size[0], patch_size[1]))
    depth = patch_size[2:]
    spread = grey / (in_channels * math.prod(depth))
    return spread.view(len(grey), 1, *grey.shape[1:], *(1 for _ in depth)).expand(-1, in_channels, -1, -1, *depth)


def resize_filter(weight: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Resizes filters so that a resized patch gives the same response (FlexiViT, Beyer et al. 2023, section 3.3).

    Applies the pseudo-inverse of the bilinear resizing of patches to the filters: exact for larger patches, the least
    squares fit for smaller ones.

    Args:
        weight: Shape (hidden_size, rows, columns).
        size: Rows and columns of the new filters.

    Returns:
        float64, shape (hidden_size, *size).
    """
    rows, columns = (
        _resize_matrix(old, new, device=weight.device) for old, new in zip(weight.shape[1:], size, strict=True)
    )
    return torch.linalg.pinv(rows).T @ weight.double() @ torch.linalg.pinv(columns)


def _resize_matrix(old: int, new: int, *, device: torch.device) -> Tensor:
    """Matrix of shape (new, old) that linearly interpolates a line of `old` pixels to `new` pixels."""
    identity = torch.eye(old, dtype=torch.float64, device=device)
    return F.interpolate(identity.unsqueeze(0), size=new, mode="linear", align_corners=False)[0].T


def inflate_positions(table: Tensor, *, grid_size: tuple[int, ...]) -> Tensor:
    """Interpolates a 2-D position table to the grid of a volume, with an offset for each step along depth and time.

    The offsets are sine-cosine embeddings of the steps along Z and T, with a mean of zero and the standard deviation of
    the table. A single step has no offset.

    Args:
        table: Shape (side * side, hidden_size), or with one more row at the start for a class token.
        grid_size: Patches along X, Y, Z[, T].

    Returns:
        float32, shape (product of grid_size, hidden_size).
    """
    side = math.isqrt(len(table))
    plane = table[len(table) - side * side :].float()
    plane = interpolate_position_embedding(plane, old_grid=(side, side), new_grid=grid_size[:2])
    steps = sincos_position_embedding(grid_size[2:], table.shape[1]).to(table.device)
    steps = steps - steps.mean(dim=0)
    if len(steps) > 1:
        steps = steps * (plane - plane.mean(dim=0)).square().mean().sqrt() / steps.square().mean().sqrt()
    return (plane[:, None] + steps[None]).flatten(0, 1)
