"""Position embeddings for grids of any number of axes, and their interpolation to another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_position_embedding(grid_size: Sequence[int], dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Fixed sine and cosine embedding of every patch of a grid, used as the starting point of a learned one.

    The axes share the width evenly; within an axis frequencies fall geometrically from 1 to 1/`max_period`
    (Vaswani et al. 2017, section 3.5; for images He et al. 2022, "Masked Autoencoders").

    Args:
        grid_size: Patches along each axis, the last axis fastest in the token order.
        dim: Width of the embedding. What the axes cannot share evenly stays zero.
        max_period: Longest period, in patches divided by 2 pi.

    Returns:
        float32 of shape (product of grid_size, dim).
    """
    half = dim // (2 * len(grid_size))
    if half == 0:
        raise ValueError(
            f"width {dim} is too small for {len(grid_size)} axes: at least {2 * len(grid_size)} are needed"
        )
    frequencies = max_period ** (-torch.arange(half, dtype=torch.float64) / half)
    coordinates = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid_size), indexing="ij")
    parts = []
    for coordinate in coordinates:
        angles = coordinate.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    table = torch.cat(parts, dim=1)
    return F.pad(table, (0, dim - table.shape[1])).float()


def interpolate_position_embedding(table: Tensor, *, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Linear interpolation of a position table along every axis (patch centres, as `align_corners=False`).

    Args:
        table: Shape (product of old_grid, dim).
        old_grid: Patches along each axis of `table`.
        new_grid: Patches wanted along each axis.

    Returns:
        Shape (product of new_grid, dim), dtype of `table`.

    Raises:
        ValueError: The grids differ in their number of axes, or `table` does not fit `old_grid`.
    """
    if len(old_grid) != len(new_grid):
        raise ValueError(f"grids {tuple(old_grid)} and {tuple(new_grid)} must have the same number of axes")
    rows, dim = table.shape
    if rows != math.prod(old_grid):
        raise ValueError(f"the table has {rows} rows, but grid {tuple(old_grid)} has {math.prod(old_grid)} patches")
    values = table.float().reshape(*old_grid, dim)
    for axis, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
        if old != new:
            lines = values.movedim(axis, -1)
            shape = lines.shape[:-1]
            lines = F.interpolate(lines.reshape(1, -1, old), size=new, mode="linear", align_corners=False)
            values = lines.reshape(*shape, new).movedim(-1, axis)
    return values.reshape(-1, dim).to(table.dtype)
