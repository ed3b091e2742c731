"""Parts of the training manifests by subject: folds, and subjects that calibrate probabilities. Nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from umbrella_data import read_manifest
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Answer, subject_key
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.config.manifest_part import ManifestPart, Rows
from umbrella_train.distributed.ranks import on_first_rank
from umbrella_train.errors import RunError

Answers = Mapping[str, Mapping[str, Sequence[Answer]]]
"""The answers of each subject (see `subject_key`) by task."""


def open_source(source: DatasetConfig, *, may_end_with_user: bool = False) -> Manifest:
    """Open the manifest of a source, or its part; every place that reads a source opens the same rows.

    Raises:
        ManifestError: As from `read_manifest`.
    """
    manifest = read_manifest(source.manifest, data_root=source.data_root, may_end_with_user=may_end_with_user)
    return manifest.select(source.rows.numbers) if isinstance(source, ManifestPart) else manifest


@dataclass(frozen=True)
class Parts:
    """The training manifests of a config in parts; no subject is in two of them.

    Attributes:
        train: To train on.
        evaluation: The fold to evaluate on; empty without folds.
        calibration: To fit the temperature of probabilities; empty without `data.calibration_fraction`.
        num_subjects: Of each of the three; zeros if there is one part only, whose rows are not read.
    """

    train: Sequence[DatasetConfig]
    evaluation: Sequence[DatasetConfig] = ()
    calibration: Sequence[DatasetConfig] = ()
    num_subjects: tuple[int, int, int] = (0, 0, 0)


def split_train(sources: Sequence[DatasetConfig], *, config: RunConfig) -> Parts:
    """Split training manifests by subject as the config says (`num_folds`, `fold`, `calibration_fraction`).

    Parts are a pure function of the subjects, their answers and the config's seed, stratified by the answers. A subject
    of several manifests is in the same part of each. The first rank reads all rows, and tells the other ranks.

    Raises:
        ManifestError: With every problem of an invalid row.
        RunError: There are too few subjects.
    """
    if config.data.num_folds is None and not config.data.calibration_fraction:
        return Parts(sources)
    rows, num_subjects = on_first_rank(lambda: _find_rows(sources, config=config))
    train, evaluation, calibration = (
        [
            ManifestPart(**dict(source), rows=Rows(numbers))
            for source, numbers in zip(sources, of_part, strict=True)
            if len(numbers)
        ]
        for of_part in rows
    )
    return Parts(train, evaluation, calibration, num_subjects)


def deal_subjects(answers: Answers, *, num_folds: int, seed: int) -> dict[str, int]:
    """The fold of each subject, from 1 to `num_folds`.

    Subjects with the same answers are next to each other, in random order, and are dealt to the folds in turn: sizes of
    folds, and numbers of each combination of answers, differ by at most one.

    Raises:
        RunError: There are fewer subjects than folds.
    """
    if len(answers) < num_folds:
        raise RunError(f"data.num_folds: {num_folds} folds need as many subjects, and data.train has {len(answers)}")
    return {subject: place % num_folds + 1 for place, subject in enumerate(_ordered(answers, f"folds {seed}"))}


def choose_subjects(answers: Answers, *, fraction: float, seed: int) -> set[str]:
    """A fraction of the subjects, at least one, evenly spread over the combinations of answers.

    Raises:
        RunError: No subject would be left to train on.
    """
    ordered = _ordered(answers, f"calibration {seed}")
    total, count = len(ordered), max(1, round(fraction * len(ordered)))
    if count >= total:
        raise RunError(
            f"data.calibration_fraction: {fraction:g} of {total} subjects to train on leaves none; use more "
            "subjects, or a smaller fraction"
        )
    return {name for place, name in enumerate(ordered) if (place + 1) * count // total > place * count // total}


def _find_rows(
    sources: Sequence[DatasetConfig], *, config: RunConfig
) -> tuple[list[list[NDArray[np.int64]]], tuple[int, int, int]]:
    """The rows of each source in the parts train, evaluation and calibration, and the subjects of each part."""
    answers: dict[str, dict[str, list[Answer]]] = {}
    subjects: list[list[str]] = []
    for source in sources:
        subjects.append([])
        for sample in open_source(source, may_end_with_user=True):
            subject = subject_key(sample.subject)
            subjects[-1].append(subject)
            given = answers.setdefault(subject, {})
            if sample.answer is not None:
                given.setdefault(sample.task, []).append(sample.answer)
    held_out: Collection[str] = ()
    calibration: Collection[str] = ()
    data = config.data
    if data.num_folds is not None:
        folds = deal_subjects(answers, num_folds=data.num_folds, seed=config.seed)
        held_out = {subject for subject, fold in folds.items() if fold == data.fold}
    if data.calibration_fraction:
        rest = {subject: given for subject, given in answers.items() if subject not in held_out}
        calibration = choose_subjects(rest, fraction=data.calibration_fraction, seed=config.seed)
    part_of = {**dict.fromkeys(answers, 0), **dict.fromkeys(held_out, 1), **dict.fromkeys(calibration, 2)}
    parts = [np.array([part_of[subject] for subject in names]) for names in subjects]
    counts = (len(answers) - len(held_out) - len(calibration), len(held_out), len(calibration))
    return [[np.flatnonzero(of_source == part) for of_source in parts] for part in range(3)], counts


def _ordered(answers: Answers, stream: str) -> list[str]:
    """The subjects by their answers, in random order among those with the same ones."""
    by_task = {task: _levels(answers, task) for given in answers.values() for task in given}
    # Tasks with few levels first: each level of the first task is spread as evenly as the combinations.
    tasks = sorted(by_task, key=lambda task: (len(set(by_task[task].values())), task))

    def key(subject: str) -> tuple[tuple[str, ...], bytes]:
        digest = hashlib.blake2b(f"{stream}\0{subject}".encode(errors="surrogateescape"), digest_size=16).digest()
        return tuple(by_task[task].get(subject, "") for task in tasks), digest

    return sorted(answers, key=key)


def _levels(answers: Answers, task: str) -> dict[str, str]:
    """A subject's answer to a task as a word: its choices, or the tertile of its mean number among all subjects."""
    values = {subject: given[task] for subject, given in answers.items() if task in given}
    numbers = {
        subject: fmean(float(answer.value) for answer in given if answer.type == "number")
        for subject, given in values.items()
        if any(answer.type == "number" for answer in given)
    }
    limits = np.quantile(list(numbers.values()), [1 / 3, 2 / 3]) if numbers else ()
    levels = {subject: str(int(np.searchsorted(limits, number))) for subject, number in numbers.items()}
    for subject, given in values.items():
        chosen = sorted({str(answer.value) for answer in given if answer.type == "choice"})
        if chosen:
            levels[subject] = "\0".join([*chosen, levels.get(subject, "")])
    return levels
