"""The viewer of a scan after its pipeline, with its brain mask, and the questions and answers about it."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from umbrella_data.manifest.sample import Sample, hide_names
from umbrella_data.modality import ModalitySpec
from umbrella_data.pipeline.crop import box_centre
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.pipeline.resample import resample
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.volume import read_shape
from umbrella_data.scan.voxels import read_voxels
from umbrella_data.viewer import Overlay, viewer_html

_ABOUT_TIME = (ScanWarning.REPETITION_TIME, ScanWarning.SIDECAR, ScanWarning.SIDECAR_REPETITION_TIME)


def scan_viewer(
    volume: torch.Tensor,
    *,
    pipeline: Pipeline,
    paths: Sequence[Path],
    mask: Path | None = None,
    title: str = "Look through this scan",
    is_open: bool = False,
) -> str:
    """The HTML of one viewer of a preprocessed scan, see `umbrella_data.viewer.viewer_html`.

    Args:
        volume: (C, X, Y, Z) or (C, X, Y, Z, T), what the pipeline returned for the scan without a generator.
        pipeline: The pipeline.
        paths: The files of the scan.
        mask: Its brain mask, drawn over it.
        title: The text to click on.
        is_open: Whether the viewer starts with the page.

    Raises:
        ScanError: If the header of the scan, or its mask, cannot be read.
    """
    overlays = []
    if mask is not None:
        inside = mask_on_grid(mask, pipeline=pipeline, paths=paths)
        overlays.append(Overlay(name="Brain mask", values=inside, opacity=0.2))
    return viewer_html(
        volume,
        spacing=grid_spacing(pipeline, paths),
        channels=pipeline.spec.channels,
        overlays=overlays,
        title=title,
        is_open=is_open,
    )


def header_warnings(paths: Sequence[Path], *, spec: ModalitySpec) -> list[str]:
    """What is suspicious in the headers and the sidecar of a scan, each with its code, as in `umbrella-data check`.

    Repetition times are compared for series only: a DWI needs none.

    Raises:
        ScanError: If a header cannot be read.
    """
    found = dict.fromkeys(warning for path in paths for warning in read_shape(path).warnings)
    unused = () if spec.is_series else _ABOUT_TIME
    return [f"{warning}: {warning.meaning}" for warning in found if warning not in unused]


def grid_spacing(pipeline: Pipeline, paths: Sequence[Path]) -> tuple[float, float, float]:
    """Voxel size in mm, along X, Y and Z, of a scan after its pipeline.

    Raises:
        ScanError: If the header of the scan cannot be read.
    """
    config = pipeline.config
    if config.spacing is not None:
        return config.spacing
    scan = read_shape(paths[0])
    x, y, z = (
        step * old / new for step, old, new in zip(scan.spacing, scan.shape[:3], config.image_size[:3], strict=True)
    )
    return x, y, z


def mask_on_grid(mask: Path, *, pipeline: Pipeline, paths: Sequence[Path]) -> np.ndarray:
    """A brain mask on the grid of its scan after the pipeline: (X, Y, Z) bool, the voxels of which half is inside.

    Raises:
        ScanError: If the mask, or the scan, cannot be read.
    """
    read = read_voxels(mask, rank=3)
    centre = box_centre(list(paths), mask=mask, spec=pipeline.spec, config=pipeline.config)
    inside = torch.from_numpy(np.ascontiguousarray(read.frames > 0, dtype=np.float32))[None]
    share = resample(inside, spacing=read.spacing, grid=pipeline.grid, is_masked=True, centre=centre)
    return np.asarray(share[0, 0].numpy() >= 0.5)


def conversation_html(sample: Sample, *, name: Callable[[str], str]) -> str:
    """The questions and the answers of a sample, as a list; those of the system are left out.

    Args:
        sample: The sample.
        name: Maps its subject, and its files, to what the page calls them, see `hide_names`.
    """
    rows = []
    for turn in sample.messages:
        if turn.role != "system":
            kind = "Question" if turn.role == "user" else "Answer"
            rows.append(f"<dt>{kind}</dt><dd>{html.escape(hide_names(turn.text, sample, name=name))}</dd>")
    return f'<dl class="conversation">{"".join(rows)}</dl>'
