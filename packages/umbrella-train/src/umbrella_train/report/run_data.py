"""Reads the files of a run folder for the report, also of a crashed run."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbrella_data.dataset.bad_scans import LIST_NAME
from umbrella_train.config.strict_yaml import read_yaml
from umbrella_train.config.training import best_metric
from umbrella_train.evaluation.predictions import Prediction
from umbrella_train.evaluation.score_table import names_below
from umbrella_train.report.folds import fold_notes
from umbrella_train.run_folder import RunFolder, fold_folders, read_lines

_GRADIENT_KEY = re.compile(r"(?:^|/)grad/\[(?P<label>[^\]]+)\]/vision_tower\.(?P<modality>\w+)_patch_embed$")


@dataclass(frozen=True)
class Points:
    """Values over steps; a value that was not finite is NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class GradientNorms:
    """Gradient norms of one modality's patch embed: with the modality in the batch, and without it."""

    active: Points
    inactive: Points


@dataclass(frozen=True)
class RunData:
    """Data of one run.

    Attributes:
        name: Name in the report.
        config: The content of config.yaml.
        training: Lines of metrics.jsonl with a training loss.
        evaluation: The newest line with scored answers, with the newest figures of baselines; empty without one.
        validation: Lines with an evaluation loss.
        predictions: Rows of predictions.jsonl.
        pictures: PNG files by modality.
        viewers: HTML files of scans to scroll through, by modality; none unless `has_viewers`.
        notes: Messages at the top of the report: unreadable lines, a run that did not finish, ...
        is_held_out: Whether no subject or file of the evaluation data is in the training data; None if this was not
            checked.
    """

    name: str
    config: Mapping[str, Any]
    training: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, float]
    validation: Sequence[Mapping[str, Any]]
    predictions: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, Path]
    notes: Sequence[str]
    is_held_out: bool | None = True
    viewers: Mapping[str, Path] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """The modalities in the order of the config."""
        model = self.config.get("model")
        return list(model.get("modalities", {})) if isinstance(model, Mapping) else []

    @property
    def own_predictions(self) -> list[Prediction]:
        """The predictions with the questions' own scans; damaged rows are left out."""
        found = []
        for row in self.predictions:
            if row.get("condition") == "accuracy":
                with contextlib.suppress(TypeError):
                    found.append(Prediction.from_row(row))
        return found

    @property
    def last_step(self) -> int:
        """The last step with a training loss; of pooled folds, the largest number of steps of a model."""
        return max((int(row.get("step", 0)) for row in self.training), default=int(self.evaluation.get("step", 0)))

    def names_below(self, label: str) -> list[str]:
        """The names below `eval/LABEL/` of the newest evaluation, in the order of the config."""
        return names_below(self.evaluation, label, self.modalities)


def read_run(path: Path, *, name: str) -> RunData:
    """Read a run folder, under a name for the report.

    Raises:
        RunError: If the folder is not a run's folder.
    """
    folder = RunFolder.open(path)
    config, notes = read_yaml(folder.config)
    notes = [f"config.yaml: {note}" for note in notes]
    metrics, num_broken = read_lines(folder.metrics)
    predictions, num_broken_predictions = read_lines(folder.predictions)
    for file, count in ((folder.metrics, num_broken), (folder.predictions, num_broken_predictions)):
        if count:
            lines = "1 line" if count == 1 else f"{count} lines"
            notes.append(f"{file.name}: {lines} unreadable; the run was interrupted while writing")
    training = [row for row in metrics if "loss" in row]
    evaluations = [row for row in metrics if any(str(key).startswith("eval/questions/") for key in row)]
    # The baselines do not depend on the model: they hold for every evaluation of the same rows.
    baselines = [row for row in metrics if any(str(key).startswith("baseline/") for key in row)]
    notes += _changes(folder)
    notes += _left_out(folder)
    notes += _skipped(metrics)
    notes += _chosen(config)
    notes += _overlap(metrics)
    is_held_out = _is_held_out(metrics)
    if folds := [read_run(fold, name=fold.name) for fold in fold_folders(path)]:
        notes += fold_notes(path, evaluations[-1] if evaluations else {})
        notes += [f"{fold.name}: {note}" for fold in folds for note in fold.notes]
        states = [fold.is_held_out for fold in folds]
        is_held_out = False if False in states else None if None in states else True
    else:
        notes += _state(folder, training=training, is_evaluated=bool(evaluations))
    return RunData(
        name=name,
        config=config,
        training=training,
        evaluation={**baselines[-1], **evaluations[-1]} if evaluations and baselines else (evaluations or [{}])[-1],
        validation=[row for row in metrics if "eval_loss" in row],
        predictions=predictions,
        pictures=_by_modality(folder, "*.png", config=config),
        notes=notes,
        is_held_out=is_held_out,
        # A scan leaves the machine with the report only while the config says so, also if the run had it on before.
        viewers=_by_modality(folder, "*.html", config=config) if has_viewers(config) else {},
    )


def _changes(folder: RunFolder) -> list[str]:
    """Settings that were changed when the run was resumed; paths must not leave the machine with a shared report."""
    rows, _ = read_lines(folder.changes)
    return [
        f"resumed after step {row.get('step')} with another setting: "
        + (line if "/" not in line and "\\" not in line else f"{line.partition(':')[0]} (see config.yaml)")
        for row in rows
        for line in row.get("changes", ())
    ]


def _overlap(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is in both training and evaluation data, as the newest line about it says."""
    rows = _overlap_rows(metrics)
    if not rows:
        return []
    if "overlap/unchecked_rows" in rows[-1]:
        number = rows[-1]["overlap/unchecked_rows"]
        return [
            f"Not compared: {number} rows are too many to look for subjects of the training data before a run; "
            "umbrella-data check finds them"
        ]
    subjects, files = (int(rows[-1].get(f"overlap/{what}") or 0) for what in ("subjects", "files"))
    return [
        f"Not held out: {subjects} subjects and the content of {files} files of the evaluation data are also in the "
        "training data (data.allow_overlap)"
    ]


def _overlap_rows(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in metrics if "overlap/subjects" in row or "overlap/unchecked_rows" in row]


def _is_held_out(metrics: Sequence[Mapping[str, Any]]) -> bool | None:
    rows = _overlap_rows(metrics)
    return True if not rows else None if "overlap/unchecked_rows" in rows[-1] else False


def _left_out(folder: RunFolder) -> list[str]:
    """Number of samples that were skipped for unusable scans, by reason."""
    rows, _ = read_lines(folder.path / LIST_NAME)
    reasons = Counter(str(row.get("reason")) for row in rows)
    if not reasons:
        return []
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    samples = "1 sample was" if len(rows) == 1 else f"{len(rows)} samples were"
    return [f"{LIST_NAME}: {samples} skipped for unusable scans ({listed})"]


def _chosen(config: Mapping[str, Any]) -> list[str]:
    """That the evaluation subjects have chosen the model: a figure of the best of many checkpoints is too good."""
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        return []
    is_used = trainer.get("load_best_model_at_end") or trainer.get("early_stopping_patience") is not None
    key = best_metric(trainer) or ""
    if not is_used or not key.startswith("eval"):
        return []
    return [
        f"The model was chosen by {key} on the evaluation subjects (trainer.load_best_model_at_end, "
        "early_stopping_patience), so that its scores on them are too good; test it on other subjects"
    ]


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Number of steps that were skipped for a loss or gradient that is not finite."""
    notes = []
    for key, where in (("non_finite/skipped", "non_finite.jsonl"), ("non_finite/skipped_by_deepspeed", "DeepSpeed")):
        count = max((int(row.get(key) or 0) for row in metrics), default=0)
        if count:
            steps = "1 step was" if count == 1 else f"{count} steps were"
            notes.append(f"{where}: {steps} skipped: the loss or a gradient was not finite")
    return notes


def points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The values of one key over the steps."""
    found = [(int(row["step"]), _number(row[key])) for row in rows if key in row and "step" in row]
    return _points(sorted(found, key=lambda pair: pair[0]))


def gradient_norms(rows: Sequence[Mapping[str, Any]]) -> dict[str, GradientNorms]:
    """The gradient norms of each modality's whole patch embed, active and inactive distinguished by their keys."""
    found: dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            match = _GRADIENT_KEY.search(key)
            if match is not None and "step" in row:
                active, inactive = found.setdefault(match["modality"], ([], []))
                (inactive if match["label"] == "inactive" else active).append((int(row["step"]), _number(value)))
    return {modality: GradientNorms(*map(_points, lists)) for modality, lists in found.items()}


def label_of(name: str) -> str:
    """Text for a name such as `T1/lesion_side`."""
    modality, _, task = name.partition("/")
    return f"{modality} · {task.replace('_', ' ')}" if task else modality


def _points(pairs: Sequence[tuple[int, float]]) -> Points:
    return Points(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def has_viewers(config: Mapping[str, Any]) -> bool:
    """Whether whole scans are in the report: as `report.viewer` says, by default those of the synthetic cohort only."""
    section, data = config.get("report"), config.get("data")
    choice = section.get("viewer") if isinstance(section, Mapping) else None
    return isinstance(data, Mapping) and data.get("synthetic") is not None if choice is None else bool(choice)


def _by_modality(folder: RunFolder, pattern: str, *, config: Mapping[str, Any]) -> dict[str, Path]:
    """Files of the pictures' folder by modality, in the order of the config."""
    found = {path.stem: path for path in sorted(folder.pictures.glob(pattern))}
    model = config.get("model")
    order = list(model.get("modalities", {})) if isinstance(model, Mapping) else []
    return {name: found[name] for name in [*order, *found] if name in found}


def _state(folder: RunFolder, *, training: Sequence[Mapping[str, Any]], is_evaluated: bool) -> list[str]:
    notes = []
    if not training:
        notes.append("metrics.jsonl has no training loss: the run ended before its first logging step")
    elif not (folder.model / "config.json").exists():
        notes.append(f"The run did not finish: its last training loss is of step {training[-1].get('step')}")
    if not is_evaluated:
        notes.append("No scored answers: the run was not evaluated")
    lost = [row.get("step") for row in training if not math.isfinite(_number(row["loss"]))]
    if lost:
        notes.append(f"The loss was not finite in {len(lost)} of {len(training)} lines, first at step {lost[0]}")
    return notes
