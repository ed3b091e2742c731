"""Position embeddings and their interpolation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from umbrella_model.positions import interpolate_position_embedding, sincos_position_embedding


@pytest.mark.parametrize("grid", [(2, 3, 4), (2, 3, 1, 2)])
def test_sincos_equals_its_formula(grid):
    dim, half = 26, 26 // (2 * len(grid))
    table = sincos_position_embedding(grid, dim)
    assert table.shape == (math.prod(grid), dim)
    for row, cell in zip(table, itertools.product(*(range(size) for size in grid)), strict=True):
        expected = []
        for coordinate in cell:
            angles = [coordinate * 10_000.0 ** (-i / half) for i in range(half)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        expected += [0.0] * (dim - len(expected))
        torch.testing.assert_close(row, torch.tensor(expected))


def test_sincos_positions_are_distinct():
    table = sincos_position_embedding((6, 6, 6), 48)
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 10
    assert distances.min() > 0.5


def test_sincos_raises_when_the_hidden_size_is_too_small():
    with pytest.raises(ValueError, match=r"7 .* 4 axes.*8"):
        sincos_position_embedding((2, 2, 2, 2), 7)


def test_interpolation_to_the_same_grid_is_the_identity():
    table = torch.randn(24, 5)
    assert torch.equal(interpolate_position_embedding(table, old_grid=(2, 3, 4), new_grid=(2, 3, 4)), table)


def test_interpolation_equals_trilinear_of_torch():
    table = torch.randn(2 * 3 * 4, 5)
    ours = interpolate_position_embedding(table, old_grid=(2, 3, 4), new_grid=(4, 5, 3))
    theirs = F.interpolate(table.T.reshape(1, 5, 2, 3, 4), size=(4, 5, 3), mode="trilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs.reshape(5, -1).T)


def test_interpolation_of_four_axes_is_linear_along_each():
    grid, new = (2, 2, 2, 3), (2, 4, 2, 6)
    cells = torch.cartesian_prod(*(torch.arange(float(size)) for size in grid))
    ours = interpolate_position_embedding(cells, old_grid=grid, new_grid=new)
    lines = [((torch.arange(n) + 0.5) * o / n - 0.5).clamp(0, o - 1) for o, n in zip(grid, new, strict=True)]
    torch.testing.assert_close(ours, torch.cartesian_prod(*lines))


def test_interpolation_keeps_the_dtype():
    table = torch.randn(8, 4).bfloat16()
    assert interpolate_position_embedding(table, old_grid=(2, 2, 2), new_grid=(3, 3, 3)).dtype == torch.bfloat16
