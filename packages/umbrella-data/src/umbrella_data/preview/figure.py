"""Figures of a preprocessed scan: three planes with directions and patch grid, and a carpet plot of a series."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from umbrella_data.modality import ModalitySpec, find_modality
from umbrella_data.pipeline.patch_grid import patch_grid
from umbrella_data.viewer.fragment import display_limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_volume"]

# Each plane: name, axis that it cuts, axes drawn to the right and upwards, direction letters at their ends.
_PLANES = (
    ("sagittal", 0, (1, 2), "PAIS"),
    ("coronal", 1, (0, 2), "LRIS"),
    ("axial", 2, (0, 1), "LRPA"),
)
_CARPET_ROWS = 400
_BORDER = {"color": "deepskyblue", "linewidth": 0.4, "alpha": 0.7}


def draw_volume(
    volume: torch.Tensor,
    *,
    modality: str,
    patch_size: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a preprocessed scan.

    Args:
        volume: (C, X, Y, Z), or (C, X, Y, Z, T) for a series, in RAS+, as a `Pipeline` returns it.
        modality: A name or an alias.
        patch_size: Voxels (and frames) of a patch; its grid is drawn, and the title has the number of tokens.
        title: Text before the modality in the title.

    Returns:
        A matplotlib figure with a row of three central planes for each channel (of the middle frame of a series). For a
        series, also a carpet plot of its foreground voxels over time, with the left of the person on top.

    Raises:
        ValueError: If the shape is not one of the modality, or the patch size does not divide it.
        ImportError: If matplotlib is missing.
    """
    spec = find_modality(modality)
    if volume.ndim != spec.spatial_rank + 1 or volume.shape[0] != spec.num_channels:
        needed = "X, Y, Z, T" if spec.is_series else "X, Y, Z"
        raise ValueError(f"shape {tuple(volume.shape)}: {spec.name} needs ({spec.num_channels}, {needed})")
    patches = None if patch_size is None else patch_grid(volume.shape[1:], patch_size, modality=spec.name)
    values = volume.detach().float().cpu().numpy()
    num_rows = spec.num_channels + int(spec.is_series)
    try:
        # The class without pyplot has no window and no global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7.5, 0.5 + 2.5 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, 3)
    for row, channel in enumerate(values):
        frame = channel[..., channel.shape[-1] // 2] if spec.is_series else channel
        for column, plane in enumerate(_PLANES):
            axes = figure.add_subplot(grid[row, column])
            _draw_plane(axes, frame, plane=plane, patch_size=patch_size)
            if column == 0:
                axes.set_ylabel(spec.channels[row], color="0.3")
    if spec.is_series:
        frames_a_patch = None if patch_size is None else patch_size[3]
        _draw_carpet(figure.add_subplot(grid[-1, :]), values[0], frames_a_patch=frames_a_patch)
    figure.suptitle(_caption(spec, volume, patches=patches, title=title), fontsize=10)
    return figure


def _draw_plane(
    axes: Any, frame: np.ndarray, *, plane: tuple[str, int, tuple[int, int], str], patch_size: Sequence[int] | None
) -> None:
    name, cut, (right, up), letters = plane
    image = np.take(frame, frame.shape[cut] // 2, axis=cut)
    # take() keeps the order of the other two axes; the first of them is drawn to the right.
    low, high = display_limits(frame)
    axes.imshow(image.T, origin="lower", cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    width, height = image.shape
    _write_letters(axes, letters, ((0.05, 0.5), (0.95, 0.5), (0.5, 0.05), (0.5, 0.95)))
    if patch_size is not None:
        for position in range(patch_size[right], width, patch_size[right]):
            axes.axvline(position - 0.5, **_BORDER)
        for position in range(patch_size[up], height, patch_size[up]):
            axes.axhline(position - 0.5, **_BORDER)
    axes.set_title(name, fontsize=8, color="0.3")
    axes.set_xticks([])
    axes.set_yticks([])


def _write_letters(axes: Any, letters: str, places: Sequence[tuple[float, float]]) -> None:
    """Write direction letters at places from (0, 0), lower left, to (1, 1)."""
    from matplotlib.patheffects import withStroke

    style = {"color": "gold", "fontsize": 9, "fontweight": "bold", "ha": "center", "va": "center"}
    outline = [withStroke(linewidth=2, foreground="black")]  # readable on bright tissue
    for letter, (x, y) in zip(letters, places, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, path_effects=outline, **style)


def _draw_carpet(axes: Any, series: np.ndarray, *, frames_a_patch: int | None) -> None:
    """Foreground voxels of a series (X, Y, Z, T) over time, each minus its own mean (Power, NeuroImage 2017)."""
    mean = series.mean(axis=-1)
    voxels = series[mean > mean.mean()]
    voxels = voxels[:: max(1, len(voxels) // _CARPET_ROWS)]
    voxels = voxels - voxels.mean(axis=1, keepdims=True)
    limit = float(np.percentile(np.abs(voxels), 98)) or 1.0
    # Frames are counted from 1, as in the viewer below the figure.
    extent = (0.5, series.shape[-1] + 0.5, len(voxels) - 0.5, -0.5)
    axes.imshow(voxels, aspect="auto", cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest", extent=extent)
    # Voxels are in the order of X, which runs to the right: the first rows, on top, are the left of the person.
    _write_letters(axes, "LR", ((0.017, 0.95), (0.017, 0.05)))
    for position in range(frames_a_patch, series.shape[-1], frames_a_patch) if frames_a_patch else ():
        axes.axvline(position + 0.5, **_BORDER)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("frame", fontsize=8, color="0.3")
    axes.set_ylabel("voxels", color="0.3")
    axes.tick_params(labelsize=8, colors="0.3")
    axes.set_yticks([])


def _caption(spec: ModalitySpec, volume: torch.Tensor, *, patches: Sequence[int] | None, title: str | None) -> str:
    size = " × ".join(str(length) for length in volume.shape[1:])
    parts = [title] if title else []
    parts.append(f"{spec.name}, {size}")
    if patches is not None:
        parts.append(f"{prod(patches)} tokens ({' × '.join(map(str, patches))})")
    return "; ".join(parts)
