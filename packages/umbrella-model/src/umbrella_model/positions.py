"""Position embeddings for grids with any number of axes, and their interpolation to another grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_position_embedding(grid_size: Sequence[int], dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Sine-cosine embedding of every patch of a grid, the initial value of a learned one.

    The width is divided evenly between the axes; frequencies of an axis decrease geometrically from 1 to 1/`max_period`
    (Vaswani et al. 2017, section 3.5; for images He et al. 2022, "Masked Autoencoders").

    Args:
        grid_size: Patches along each axis, the last axis fastest in the token order.
        dim: Width of the embedding. The remainder of the division is zero.
        max_period: Longest period, in patches divided by 2 pi.

    Returns:
        float32 of shape (product of grid_size, dim).
    """
    half = dim // (2 * len(grid_size))
    if half == 0:
        raise ValueError(f"hidden size {dim} is too small for {len(grid_size)} axes; use at least {2 * len(grid_size)}")
    frequencies = max_period ** (-torch.arange(half, dtype=torch.float64) / half)
    coordinates = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid_size), indexing="ij")
    parts = []
    for coordinate in coordinates:
        angles = coordinate.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    table = torch.cat(parts, dim=1)
    return F.pad(table, (0, dim - table.shape[1])).float()


def interpolate_position_embedding(table: Tensor, *, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Interpolates a position table linearly along every axis (patch centres, as `align_corners=False`).

    Args:
        table: Shape (product of old_grid, dim).
        old_grid: Patches along each axis of `table`.
        new_grid: Patches along each axis of the result.

    Returns:
        Shape (product of new_grid, dim), dtype of `table`.

    """
    values = table.float().reshape(*old_grid, table.shape[1])
    for axis, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
        if old != new:
            lines = values.movedim(axis, -1)
            shape = lines.shape[:-1]
            lines = F.interpolate(lines.reshape(1, -1, old), size=new, mode="linear", align_corners=False)
            values = lines.reshape(*shape, new).movedim(-1, axis)
    return values.flatten(0, -2).to(table.dtype)
