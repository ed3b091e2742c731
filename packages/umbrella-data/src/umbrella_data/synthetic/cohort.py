"""The demo cohort: a BIDS tree of generated T1, rsfMRI and dMRI scans, with a question and an answer about each."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from umbrella_data.errors import UmbrellaDataError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.files.locks import locked
from umbrella_data.synthetic.phantom import Side, draw_bold, draw_dwi, draw_t1

COHORT_VERSION = 1
"""Increased when the same parameters give other files."""

ORIENTATIONS = ("RAS", "LAS", "PSR", "LPI", "RSA", "ASL")
"""Orientations of the stored scans, drawn at random: without the affine, left and right cannot be distinguished."""

REPETITION_TIME = 2.0
"""Seconds between frames of the BOLD series."""

_FIELD_OF_VIEW_MM = 200.0
_T1_SIZE, _BOLD_SIZE, _BOLD_FRAMES, _DWI_SIZE = 40, 24, 20, 20
_STAMP = "cohort.json"
_SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class DemoQuestion:
    """The question about the scans of one modality."""

    modality: str
    task: str
    text: str


QUESTIONS = (
    DemoQuestion(modality="T1", task="lesion_side", text="On which side is the lesion?"),
    DemoQuestion(modality="rsfMRI", task="first_active_side", text="Which hemisphere is active first?"),
    DemoQuestion(modality="dMRI", task="fibre_damage_side", text="On which side have the fibres lost their order?"),
)


@dataclass(frozen=True, kw_only=True)
class DemoCohort:
    """A finished cohort.

    Attributes:
        directory: A BIDS tree.
        train_manifest: Manifest of the training subjects; not written if there are none.
        test_manifest: Manifest of the test subjects; likewise.
    """

    directory: Path
    train_manifest: Path
    test_manifest: Path


def make_demo_cohort(
    directory: str | os.PathLike[str],
    *,
    num_train: int = 300,
    num_test: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> DemoCohort:
    """Write the cohort, or reuse one with the same parameters.

    Several processes may call this at the same time: one writes the cohort, the others wait.

    Args:
        directory: Folder of the cohort; created if missing.
        num_train: Training subjects, each with one scan of each modality.
        num_test: Test subjects.
        seed: Random seed of all scans and answers.
        progress: Called with the number of finished subjects and the total.

    Raises:
        ValueError: For negative numbers of subjects.
        UmbrellaDataError: If the directory has other files.
    """
    if num_train < 0 or num_test < 0 or num_train + num_test < 1:
        raise ValueError(f"num_train {num_train} and num_test {num_test} must not be negative or both 0")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    parameters = _parameters(num_train=num_train, num_test=num_test, seed=seed)
    # All ranks of a distributed run create it at the same time.
    with locked(root / ".lock", wait=True):
        if _is_finished(root, parameters):
            return _cohort_in(root)
        _clear(root)
        _write_json(root / _STAMP, {"parameters": parameters, "finished": False})
        _write_subjects(root, num_train=num_train, num_test=num_test, seed=seed, progress=progress)
        _write_json(root / _STAMP, {"parameters": parameters, "finished": True})
    return _cohort_in(root)


def find_demo_cohort(
    directory: str | os.PathLike[str], *, num_train: int, num_test: int, seed: int
) -> DemoCohort | None:
    """The finished cohort with these parameters in the directory, or None; nothing is written."""
    root = Path(directory)
    is_finished = _is_finished(root, _parameters(num_train=num_train, num_test=num_test, seed=seed))
    return _cohort_in(root) if is_finished else None


def _parameters(*, num_train: int, num_test: int, seed: int) -> dict[str, int]:
    return {"version": COHORT_VERSION, "num_train": num_train, "num_test": num_test, "seed": seed}


def _cohort_in(root: Path) -> DemoCohort:
    return DemoCohort(directory=root, train_manifest=root / "train.jsonl", test_manifest=root / "test.jsonl")


def _write_subjects(
    root: Path, *, num_train: int, num_test: int, seed: int, progress: Callable[[int, int], object] | None
) -> None:
    total = num_train + num_test
    sides = _draw_sides(num_train, num_test, seed=seed)
    rows: list[list[dict[str, Any]]] = []
    # Threads suffice: numpy and zlib release the GIL.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda index: _write_subject(root, index=index, sides=sides[index], seed=seed), range(total))
        for done, subject_rows in enumerate(results, start=1):
            rows.append(subject_rows)
            if progress is not None:
                progress(done, total)
    _write_json(root / "dataset_description.json", {"Name": "UMBRELLA demo cohort", "BIDSVersion": "1.10.0"})
    for name, part in (("train", rows[:num_train]), ("test", rows[num_train:])):
        lines = [json.dumps(row) for subject_rows in part for row in subject_rows]
        path = root / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        if lines:  # a manifest without rows is invalid
            path.write_text("".join(f"{line}\n" for line in lines))


def _draw_sides(num_train: int, num_test: int, *, seed: int) -> list[tuple[Side, ...]]:
    """The answers of each subject, one for each question, balanced within each split and independent of each other."""
    rng = np.random.default_rng([seed, 0])
    columns = []
    for _ in QUESTIONS:
        parts = [rng.permutation(np.arange(count) % 2) for count in (num_train, num_test)]
        columns.append(np.concatenate(parts))
    return [tuple(_SIDES[int(column[subject])] for column in columns) for subject in range(num_train + num_test)]


def _write_subject(root: Path, *, index: int, sides: tuple[Side, ...], seed: int) -> list[dict[str, Any]]:
    """Write the three scans of a subject and return its manifest rows."""
    subject = f"sub-{index + 1:04d}"
    rng = np.random.default_rng([seed, 1, index])
    orientations = [str(rng.choice(ORIENTATIONS)) for _ in QUESTIONS]
    paths = {
        "T1": f"{subject}/anat/{subject}_T1w.nii.gz",
        "rsfMRI": f"{subject}/func/{subject}_task-rest_bold.nii.gz",
        "dMRI": f"{subject}/dwi/{subject}_dwi.nii.gz",
    }
    for folder in ("anat", "func", "dwi"):
        (root / subject / folder).mkdir(parents=True, exist_ok=True)
    lesion, first, damage = sides
    _write_scan(root / paths["T1"], draw_t1(rng, size=_T1_SIZE, side=lesion), orientation=orientations[0])
    bold = draw_bold(rng, size=_BOLD_SIZE, num_frames=_BOLD_FRAMES, first=first)
    _write_scan(root / paths["rsfMRI"], bold, orientation=orientations[1])
    sidecar = root / paths["rsfMRI"].replace(".nii.gz", ".json")
    _write_json(sidecar, {"RepetitionTime": REPETITION_TIME, "TaskName": "rest"})
    b_values, directions = _gradients()
    dwi = draw_dwi(rng, size=_DWI_SIZE, b_values=b_values, directions=directions, side=damage)
    affine = _write_scan(root / paths["dMRI"], dwi, orientation=orientations[2])
    _write_gradients(root / paths["dMRI"], b_values, directions, affine=affine)
    return [
        _row(subject, question, path=paths[question.modality], side=side)
        for question, side in zip(QUESTIONS, sides, strict=True)
    ]


def _row(subject: str, question: DemoQuestion, *, path: str, side: Side) -> dict[str, Any]:
    """A row of the canonical manifest."""
    scan = {"type": "image", "modality": question.modality, "path": path}
    return {
        "id": f"{subject}_{question.task}",
        "subject": subject,
        "task": question.task,
        "messages": [
            {"role": "user", "content": [scan, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": side}]},
        ],
        "answer": {"type": "choice", "options": list(_SIDES), "value": side},
    }


def _write_scan(path: Path, values: np.ndarray, *, orientation: str) -> np.ndarray:
    """Write RAS+ values (X, Y, Z) or (X, Y, Z, T) in another orientation; return the stored affine (4, 4)."""
    spacing = _FIELD_OF_VIEW_MM / values.shape[0]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -0.5 * spacing * (values.shape[0] - 1)
    image = nib.Nifti1Image(np.round(values * 500).astype(np.int16), affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    if values.ndim == 4:
        image.header.set_zooms((spacing, spacing, spacing, REPETITION_TIME))
    # Level 1 is fast; without a time stamp, the same seed gives the same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    return np.asarray(image.affine)


def _gradients() -> tuple[np.ndarray, np.ndarray]:
    """B-values and directions of two b0 and twelve weighted volumes: corners of an icosahedron in two orientations."""
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, 1.0, golden), (0.0, 1.0, -golden), (0.0, golden, 1.0), (0.0, golden, -1.0)]
    directions = np.array([np.roll(corner, turn) for corner in corners for turn in range(3)])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.array([0.0] * 2 + [1000.0] * 12), np.concatenate([np.zeros((2, 3)), directions])


def _write_gradients(path: Path, b_values: np.ndarray, directions: np.ndarray, *, affine: np.ndarray) -> None:
    """Write bval and bvec next to a DWI; `directions` (N, 3) are in RAS world coordinates."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    stored = directions @ axes
    if np.linalg.det(axes) > 0:
        # FSL's convention: the first component is mirrored where the stored axes are right-handed.
        stored[:, 0] *= -1
    stem = path.name.removesuffix(".nii.gz")
    path.with_name(f"{stem}.bval").write_text(" ".join(f"{b:g}" for b in b_values) + "\n")
    rows = [" ".join(f"{number:.6f}" for number in row) for row in stored.T]
    path.with_name(f"{stem}.bvec").write_text("\n".join(rows) + "\n")


def _is_finished(root: Path, parameters: dict[str, int]) -> bool:
    try:
        stamp = json.loads((root / _STAMP).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(stamp == {"parameters": parameters, "finished": True})


def _clear(root: Path) -> None:
    """Remove another or an unfinished cohort; raise an error if the folder has other files."""
    if (root / _STAMP).exists():
        for folder in root.glob("sub-*"):
            shutil.rmtree(folder)
    elif any(entry.name != ".lock" for entry in root.iterdir()):
        raise UmbrellaDataError(f"{root}: not empty and not a demo cohort; give an empty or a new directory")


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, [json.dumps(content, indent=1).encode() + b"\n"])
