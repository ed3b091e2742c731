"""Figures have three planes for each channel, with the correct direction letters."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need the extra [preview]")

from umbrella_data.preview.figure import draw_volume


def to_png(figure: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)  # type: ignore[attr-defined]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("modality", "shape", "patch_size", "num_axes", "tokens"),
    [
        ("T1", (1, 16, 18, 20), None, 3, None),
        ("T1w", (1, 16, 16, 16), (8, 8, 8), 3, "8 tokens"),
        ("dMRI", (2, 16, 16, 16), (8, 8, 4), 6, "16 tokens"),
        ("rsfMRI", (1, 8, 8, 8, 12), (4, 4, 4, 4), 4, "24 tokens"),
    ],
)
def test_each_modality_is_drawn(
    modality: str, shape: tuple[int, ...], patch_size: tuple[int, ...] | None, num_axes: int, tokens: str | None
) -> None:
    figure = draw_volume(torch.randn(shape), modality=modality, patch_size=patch_size, title="a subject")
    assert len(figure.axes) == num_axes
    caption = figure.get_suptitle()
    assert caption.startswith("a subject; ")
    assert tokens is None or tokens in caption
    assert to_png(figure).startswith(b"\x89PNG")


def test_direction_letters_match_the_axes() -> None:
    volume = torch.zeros(1, 9, 9, 9)
    volume[0, 8, 4, 4] = volume[0, 4, 7, 4] = volume[0, 4, 4, 6] = 1.0  # right edge; anterior; superior
    for axes in draw_volume(volume, modality="T1").axes:
        image = axes.images[0].get_array()
        letters = {text.get_text(): text.get_position() for text in axes.texts}
        rows, columns = np.nonzero(np.asarray(image))
        # The bright voxel of a letter at the right or upper end is beyond the middle on that side.
        ends = {"sagittal": ("A", "S", 7, 6), "coronal": ("R", "S", 8, 6), "axial": ("R", "A", 8, 7)}
        right, up, column, row = ends[axes.get_title()]
        assert letters[right][0] > 0.9
        assert letters[up][1] > 0.9
        assert columns.max() == column
        assert rows.max() == row
        assert axes.images[0].origin == "lower"


def test_carpet_has_the_left_on_top_and_patch_borders_in_time() -> None:
    volume = torch.zeros(1, 8, 8, 8, 12)
    volume[0, 2:6] = 100.0
    volume[0, 2:4, ..., 6] += 1.0  # the left half of the foreground, in one frame
    carpet = draw_volume(volume, modality="rsfMRI", patch_size=(4, 4, 4, 3)).axes[-1]
    image = np.asarray(carpet.images[0].get_array())
    assert (image[: len(image) // 2, 6] > image[len(image) // 2 :, 6].max()).all()
    assert carpet.images[0].origin == "upper"
    heights = {text.get_text(): text.get_position()[1] for text in carpet.texts}
    assert heights["L"] > 0.9
    assert heights["R"] < 0.1
    # Frames are counted from 1.
    assert list(carpet.images[0].get_extent()[:2]) == [0.5, 12.5]
    assert [line.get_xdata()[0] for line in carpet.lines] == [3.5, 6.5, 9.5]


def test_contrast_is_set_by_the_foreground() -> None:
    volume = torch.full((1, 40, 40, 40), -1.0)
    volume[0, 18:22, 18:22, 18:22] = torch.linspace(1, 2, 64).reshape(4, 4, 4)
    for axes in draw_volume(volume, modality="T1").axes:
        low, high = axes.images[0].get_clim()
        assert low == -1.0
        assert 1.9 < high <= 2.0


def test_shape_of_another_modality_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 8\): dMRI needs \(2, X, Y, Z\)"):
        draw_volume(torch.zeros(1, 8, 8, 8), modality="dMRI")


@pytest.mark.parametrize("patch_size", [(4, 4, 3), (4, 4), (4, 4, 4, 4)])
def test_patch_size_that_does_not_divide_the_volume_is_rejected(patch_size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patch"):
        draw_volume(torch.zeros(1, 8, 8, 8), modality="T1", patch_size=patch_size)
