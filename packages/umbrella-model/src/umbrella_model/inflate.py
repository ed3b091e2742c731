"""Initialisation of 3-D and 4-D patch embeds from the patch filter and positions of a pretrained vision encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from umbrella_model.patch_embed import PatchEmbed
from umbrella_model.positions import interpolate_position_embedding, sincos_position_embedding


@dataclass(frozen=True)
class PatchWeights:
    """The patch filter and positions of a pretrained encoder, the source of `init="inflate"`.

    Attributes:
        weight: Shape (hidden_size, channels, *patch), with two spatial axes (images) or three (volumes).
        bias: Shape (hidden_size,), or None.
        positions: Shape (product of grid_size, hidden_size), without special tokens; None for sine-cosine positions.
        grid_size: Patches along each spatial axis of `positions`.
    """

    weight: Tensor
    bias: Tensor | None
    positions: Tensor | None
    grid_size: tuple[int, ...]


@torch.no_grad()
def inflate_patch_embed(patch_embed: PatchEmbed, patches: PatchWeights) -> None:
    """Initialises a patch embed from the patch filter and positions of a pretrained encoder.

    Image rows become X, columns Y. If a patch is as deep as the volume and has the 2-D encoder's size in the plane, a
    volume that repeats a grey image along Z (and T and the channels) gets the 2-D encoder's patch features. The filter
    of a volume encoder is kept as it is if patch size and channels are equal.

    Args:
        patch_embed: The patch embed to fill.
        patches: From `load_vision_encoder`.
    """
    config = patch_embed.config
    weight = inflate_filter(patches.weight, patch_size=config.patch_size, in_channels=config.in_channels)
    patch_embed.proj.weight.copy_(weight.flatten(1))
    if patches.bias is None:
        patch_embed.proj.bias.zero_()
    else:
        patch_embed.proj.bias.copy_(patches.bias)
    if patches.positions is None:
        table = sincos_position_embedding(config.grid_size, patch_embed.proj.out_features)
    else:
        table = inflate_positions(patches.positions, old_grid=patches.grid_size, grid_size=config.grid_size)
    patch_embed.position_embedding.copy_(table)


def inflate_filter(weight: Tensor, *, patch_size: tuple[int, ...], in_channels: int) -> Tensor:
    """Spreads a patch filter over depth and time (Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?").

    Channels are summed to a grey filter, which is distributed evenly over the new channels; those of a volume encoder
    are kept if their number is equal. The filter is resized if sizes differ, and distributed evenly over the axes that
    it does not have, so that the response to an image repeated along them is unchanged.

    Args:
        weight: Shape (hidden_size, channels, rows, columns[, planes]).
        patch_size: Voxels along X, Y, Z[, T].
        in_channels: Channels of the volume.

    Returns:
        float64, shape (hidden_size, in_channels, *patch_size).
    """
    num_axes = weight.dim() - 2
    weight = weight.double()
    if num_axes == 2 or weight.shape[1] != in_channels:
        weight = (weight.sum(dim=1, keepdim=True) / in_channels).expand(-1, in_channels, *weight.shape[2:])
    weight = resize_filter(weight, size=patch_size[:num_axes])
    more = patch_size[num_axes:]
    spread = weight / math.prod(more)
    return spread.view(*spread.shape, *(1 for _ in more)).expand(*spread.shape, *more)


def resize_filter(weight: Tensor, *, size: tuple[int, ...]) -> Tensor:
    """Resizes filters so that a resized patch gives the same response (FlexiViT, Beyer et al. 2023, section 3.3).

    Applies the pseudo-inverse of the linear resizing of patches along each axis to the filters: exact for larger
    patches, the least squares fit for smaller ones.

    Args:
        weight: Shape (..., *old size).
        size: The new size along the last axes.

    Returns:
        float64, shape (..., *size).
    """
    weight = weight.double()
    for axis, new in zip(range(-len(size), 0), size, strict=True):
        if weight.shape[axis] != new:
            resize = _resize_matrix(weight.shape[axis], new, device=weight.device)
            weight = (weight.movedim(axis, -1) @ torch.linalg.pinv(resize)).movedim(-1, axis)
    return weight


def _resize_matrix(old: int, new: int, *, device: torch.device) -> Tensor:
    """Matrix of shape (new, old) that linearly interpolates a line of `old` pixels to `new` pixels."""
    identity = torch.eye(old, dtype=torch.float64, device=device)
    return F.interpolate(identity.unsqueeze(0), size=new, mode="linear", align_corners=False)[0].T


def inflate_positions(table: Tensor, *, old_grid: tuple[int, ...], grid_size: tuple[int, ...]) -> Tensor:
    """Interpolates a position table to the grid of a scan, with an offset for each step along axes it does not have.

    The offsets are sine-cosine embeddings of the steps along Z and T (or T alone, for the table of a volume encoder),
    with a mean of zero and the standard deviation of the table. A single step has no offset.

    Args:
        table: Shape (product of old_grid, hidden_size).
        old_grid: Patches along each axis of the table.
        grid_size: Patches along X, Y, Z[, T].

    Returns:
        float32, shape (product of grid_size, hidden_size).
    """
    num_axes = len(old_grid)
    plane = interpolate_position_embedding(table.float(), old_grid=old_grid, new_grid=grid_size[:num_axes])
    more = grid_size[num_axes:]
    if math.prod(more) == 1:
        return plane
    steps = sincos_position_embedding(more, table.shape[1]).to(table.device)
    steps = steps - steps.mean(dim=0)
    steps = steps * (plane - plane.mean(dim=0)).square().mean().sqrt() / steps.square().mean().sqrt()
    return (plane[:, None] + steps[None]).flatten(0, 1)
