"""The HTML of one viewer, with its scan as embedded NIfTI files, and the script of a page with viewers.

The library is NiiVue (`niivue.umd.js`, BSD-2, see `LICENSE.niivue.txt`), as its npm package distributes it.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
import torch

NUM_LEVELS = 4096
"""Values of a volume are rounded to this many levels: NIfTI has no 16-bit floats, and more levels hardly compress."""
MAX_FRAMES = 16
"""The most frames of a series in a page."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """A volume drawn in colour over a scan.

    Attributes:
        name: Its name on the page.
        values: (X, Y, Z) on the grid of the scan, bool or real. Voxels of 0 or less are transparent; give another
            overlay for values below 0.
        colormap: A colour map of NiiVue, such as `red`, `hot` or `winter`.
        opacity: From 0 to 1, when the viewer opens.
    """

    name: str
    values: np.ndarray
    colormap: str = "red"
    opacity: float = 0.4


def viewer_html(
    volume: torch.Tensor,
    *,
    spacing: Sequence[float],
    channels: Sequence[str],
    overlays: Sequence[Overlay] = (),
    title: str = "Look through the scan",
    max_frames: int = MAX_FRAMES,
    is_open: bool = False,
) -> str:
    """The HTML of one viewer: a `<details>` element that starts it when it is opened.

    The page also needs one `<script>` with `viewer_script()`, after the viewers or in the head with `defer`.

    Args:
        volume: (C, X, Y, Z), or (C, X, Y, Z, T) for a series, in RAS+, as a `Pipeline` returns it.
        spacing: Voxel size in mm along X, Y and Z. Positions on the page are in mm from the centre of the volume.
        channels: Names of the C channels; one is shown at a time.
        overlays: Volumes to draw over it, such as a brain mask.
        title: The text to click on.
        max_frames: The most frames of a series, evenly spaced; the page says which are shown.
        is_open: Whether the viewer starts with the page. Only one viewer of a page is open at a time.

    Raises:
        ValueError: If a shape or the number of channels does not fit, or a value is not finite.
    """
    values = volume.detach().float().cpu().numpy()
    if values.ndim not in (4, 5) or len(spacing) != 3:
        raise ValueError(f"a volume of shape {values.shape} with {len(spacing)} voxel sizes cannot be shown: give "
                         "(C, X, Y, Z) or (C, X, Y, Z, T), and three sizes in mm")  # fmt: skip
    if len(channels) != len(values):
        raise ValueError(f"{len(channels)} names of channels for a volume of {len(values)} channels: {channels}")
    for overlay in overlays:
        if overlay.values.shape != values.shape[1:4]:
            raise ValueError(f"overlay {overlay.name}: shape {overlay.values.shape} is not the scan's, "
                             f"{values.shape[1:4]}")  # fmt: skip
    num_frames = values.shape[4] if values.ndim == 5 else 1
    shown = sorted({round(place) for place in np.linspace(0, num_frames - 1, min(num_frames, max_frames))})
    data: dict[str, Any] = {
        "channels": [
            _channel(name, channel[..., shown] if channel.ndim == 4 else channel, spacing)
            for name, channel in zip(channels, values, strict=True)
        ],
        "overlays": [_overlay(overlay, spacing) for overlay in overlays],
        "frames": [frame + 1 for frame in shown],
        "num_frames": num_frames,
    }
    # A text with `</script>` would end the element.
    text = json.dumps(data).replace("<", "\\u003c")
    opened = " open" if is_open else ""
    return (f'<details class="scan-viewer"{opened}><summary>{html.escape(title)}</summary>\n'
            f'<script type="application/json">{text}</script></details>')  # fmt: skip


def viewer_script() -> str:
    """The JavaScript of a page with viewers, for a `<script>` element or a file: NiiVue and what starts a viewer."""
    folder = files("umbrella_data.viewer")
    texts = [
        (folder / name).read_text(encoding="utf-8") for name in ("LICENSE.niivue.txt", "niivue.umd.js", "viewer.js")
    ]
    return "/*\n{}*/\n{}\n{}".format(*texts)


def display_limits(values: np.ndarray) -> tuple[float, float]:
    """The values drawn in black and in white."""
    low = float(np.percentile(values, 1))
    # The foreground sets the upper limit: a small scan in a wide grid would otherwise be all white.
    foreground = values[values > values.min()]
    high = float(np.percentile(foreground, 99.5)) if len(foreground) else low
    return low, max(high, low + 1e-6)


def _channel(name: str, values: np.ndarray, spacing: Sequence[float]) -> dict[str, Any]:
    # The limits of the middle frame, as in the figures: all frames would take long.
    low, high = display_limits(values[..., values.shape[3] // 2] if values.ndim == 4 else values)
    return {"name": name, "low": low, "high": high, "nifti": _embed(values, spacing, name=name)}


def _overlay(overlay: Overlay, spacing: Sequence[float]) -> dict[str, Any]:
    values = np.maximum(overlay.values.astype(np.float32), 0)
    high = float(values.max()) or 1.0
    # Voxels below the lower limit are transparent: half a level, so that 0 is and all others are not.
    low = high / NUM_LEVELS / 2
    shown = {"name": overlay.name, "colormap": overlay.colormap, "opacity": overlay.opacity}
    return {**shown, "low": low, "high": high, "nifti": _embed(values, spacing, name=overlay.name)}


def _embed(values: np.ndarray, spacing: Sequence[float], *, name: str) -> str:
    return base64.b64encode(to_nifti(values, spacing, name=name)).decode()


def to_nifti(values: np.ndarray, spacing: Sequence[float], *, name: str = "volume") -> bytes:
    """A compressed NIfTI file of int16 with a slope: values are rounded to `NUM_LEVELS` levels of their range.

    Args:
        values: (X, Y, Z) or (X, Y, Z, T), RAS+.
        spacing: Voxel size in mm; the centre of the volume is at 0, 0, 0 mm.
        name: What the volume is, for errors.

    Raises:
        ValueError: If a value is not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name}: has values that are not finite; replace them before it is shown")
    slope = (high - low) / (NUM_LEVELS - 1) or 1.0
    stored = np.round((values.astype(np.float64) - low) / slope).astype("<i2")
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-step * (size - 1) / 2 for step, size in zip(spacing, values.shape[:3], strict=True)]
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype("<i2")
    header.set_data_shape(values.shape)
    header.set_zooms((*spacing, *[1.0] * (values.ndim - 3)))
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    header.set_xyzt_units("mm", "sec")
    header.set_slope_inter(slope, low)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    # The same volume gives the same bytes: no time of day.
    return gzip.compress(header.binaryblock + bytes(4) + stored.tobytes(order="F"), compresslevel=6, mtime=0)
