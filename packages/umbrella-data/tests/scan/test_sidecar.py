"""The repetition time of a series comes from its sidecar, and is compared with its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.sidecar import sidecar_files
from umbrella_data.scan.volume import load_volume, read_shape

NAME = "sub-01/func/sub-01_task-rest_run-1_bold"


@pytest.fixture
def series(nifti: Any, random_voxels: Any) -> Path:
    """A series with 2 s from frame to frame in its header, and no sidecar."""
    return nifti.write(random_voxels(4, 5, 6, 7), f"{NAME}.nii.gz", repetition_time=2.0)


def facts(path: Path) -> tuple[float | None, tuple[ScanWarning, ...]]:
    shape, volume = read_shape(path), load_volume(path, modality="rsfMRI")
    assert (shape.repetition_time, shape.warnings) == (volume.repetition_time, volume.warnings)
    return volume.repetition_time, volume.warnings


def write_sidecar(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_repetition_time_is_the_headers_when_there_is_no_sidecar(series: Path) -> None:
    assert facts(series) == (2.0, ())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0, (2.0, ())),
        (2.004, (2.004, ())),
        (2.1, (2.1, (ScanWarning.SIDECAR_REPETITION_TIME,))),
        (2000, (2.0, (ScanWarning.SIDECAR,))),
        ("2.0", (2.0, (ScanWarning.SIDECAR,))),
        (True, (2.0, (ScanWarning.SIDECAR,))),
        (-2.0, (2.0, (ScanWarning.SIDECAR,))),
        (float("nan"), (2.0, (ScanWarning.SIDECAR,))),
        (None, (2.0, (ScanWarning.SIDECAR,))),
    ],
)
def test_repetition_time_is_compared_when_the_sidecar_has_one(series: Path, value: Any, expected: Any) -> None:
    write_sidecar(series.with_name("sub-01_task-rest_run-1_bold.json"), json.dumps({"RepetitionTime": value}))
    assert facts(series) == expected


def test_sidecar_in_upper_case_is_read(series: Path) -> None:
    write_sidecar(series.with_name("sub-01_task-rest_run-1_bold.JSON"), '{"RepetitionTime": 3.0}')
    assert facts(series) == (3.0, (ScanWarning.SIDECAR_REPETITION_TIME,))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "[" * 100_000, '{"x": "' + "x" * (1 << 22) + '"}'])
def test_warning_when_the_sidecar_is_not_an_object(series: Path, content: str) -> None:
    series.with_name("sub-01_task-rest_run-1_bold.json").write_bytes(content.encode("latin-1"))
    assert facts(series) == (2.0, (ScanWarning.SIDECAR,))


def test_warning_when_the_sidecar_is_a_pipe(series: Path) -> None:
    os.mkfifo(series.with_name("sub-01_task-rest_run-1_bold.json"))
    assert facts(series) == (2.0, (ScanWarning.SIDECAR,))


def test_repetition_time_is_inherited_from_a_sidecar_above(series: Path, tmp_path: Path) -> None:
    write_sidecar(tmp_path / "task-rest_bold.json", '{"RepetitionTime": 3.0}')
    # Not a BIDS tree yet: folders above are not searched.
    assert facts(series) == (2.0, ())
    write_sidecar(tmp_path / "dataset_description.json", "{}")
    assert facts(series) == (3.0, (ScanWarning.SIDECAR_REPETITION_TIME,))
    write_sidecar(tmp_path / "sub-01" / "sub-01_task-rest_bold.json", '{"RepetitionTime": 2.0}')
    assert facts(series) == (2.0, ())
    write_sidecar(series.with_name("sub-01_task-rest_run-1_bold.json"), '{"EchoTime": 0.03}')
    assert facts(series) == (2.0, ())
    assert [file.name for file in sidecar_files(series)] == [
        "sub-01_task-rest_run-1_bold.json",
        "sub-01_task-rest_bold.json",
        "task-rest_bold.json",
    ]


def test_warning_when_an_inherited_sidecar_is_a_link_out_of_the_tree(
    series: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    write_sidecar(tmp_path / "dataset_description.json", "{}")
    outside = tmp_path_factory.mktemp("outside") / "x.json"
    write_sidecar(outside, '{"RepetitionTime": 2.0, "secret": 1}')
    inherited = tmp_path / "task-rest_bold.json"
    inherited.symlink_to(outside)
    assert facts(series) == (2.0, (ScanWarning.SIDECAR,))
    inherited.unlink()
    write_sidecar(tmp_path / ".store" / "x.json", '{"RepetitionTime": 2.0}')
    inherited.symlink_to(tmp_path / ".store" / "x.json")
    assert facts(series) == (2.0, ())


def test_repetition_time_comes_from_the_sidecar_when_the_header_has_none(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(4, 5, 6, 7), "bold.nii", repetition_time=2000.0)
    write_sidecar(path.with_name("bold.json"), '{"RepetitionTime": 2.0}')
    assert facts(path) == (2.0, (ScanWarning.REPETITION_TIME,))


def test_warnings_of_all_files_are_collected_when_maps_are_given(nifti: Any) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    fa, md = (nifti.write(rng.random((4, 5, 6), dtype=np.float32), f"{name}.nii") for name in ("fa", "md"))
    assert load_volume([fa, md], modality="dMRI").warnings == ()
    nifti.patch(md, 72, b"\x08\x00")
    assert load_volume([fa, md], modality="dMRI").warnings == (ScanWarning.BITPIX,)
    nifti.patch(fa, 72, b"\x08\x00")
    assert load_volume([fa, md], modality="dMRI").warnings == (ScanWarning.BITPIX,)
