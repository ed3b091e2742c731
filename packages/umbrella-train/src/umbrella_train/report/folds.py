"""The pooled answers of the folds of a cross-validation, in a folder that is read like that of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from umbrella_data.files.atomic import write_atomically
from umbrella_data.manifest.sample import subject_key
from umbrella_data.privacy import names_by_hash, pseudonyms, replace_hashes
from umbrella_train.config.schema import flatten
from umbrella_train.config.strict_yaml import read_yaml
from umbrella_train.errors import RunError
from umbrella_train.evaluation.metrics import summarise
from umbrella_train.evaluation.predictions import Prediction
from umbrella_train.evaluation.text_scores import text_scores
from umbrella_train.run_folder import RunFolder, fold_folders, read_lines, write_lines

_MAIN = ("accuracy", "balanced_accuracy", "auroc", "error", "r2", "pearson")
"""Figures whose mean, minimum and maximum over the folds are given."""
# Folds with different values of these are not folds of one split.
_SAME_SPLIT = ("seed", "data.num_folds", "data.train", "data.synthetic")
NUM_MODELS = "folds/models"
"""Key of the number of folds in the pooled metrics."""


def pool_folds(path: Path) -> RunFolder:
    """Write `config.yaml`, `metrics.jsonl` and `predictions.jsonl` of all folds together; earlier ones are replaced.

    The figures are those of `summarise` over the answers of all folds, each from the model that was not trained on the
    subject, and for the main ones `eval/LABEL_fold_mean/NAME`, `_fold_min` and `_fold_max`. So are those of baselines,
    with `baselines.jsonl`, once every fold with answers has them. Subjects are hashed with one salt, which is in the
    folder.

    Args:
        path: The folder of the folds `fold-1`, `fold-2`, ...

    Raises:
        RunError: A fold is missing or not finished, or the folds are not of one split; or as `text_scores`.
    """
    folds = [RunFolder(fold) for fold in fold_folders(path)]
    configs = [read_yaml(fold.config)[0] for fold in folds]
    _check_split(path, folds, configs)
    folder = RunFolder(path)
    answers = {fold.path: _read_answers(fold.predictions) for fold in folds}
    predictions = [Prediction.from_row(row) for row in _with_one_salt(path, answers)]
    figures = [_newest_figures(fold) for fold in folds]
    report = configs[0].get("report") or {}
    lexicon = report.get("laterality_lexicon")
    texts = text_scores(laterality_lexicon=None if lexicon is None else Path(lexicon))
    seed = int(configs[0].get("seed") or 0)
    config = configs[0] | {"name": path.name, "output_dir": str(path.parent)}
    config["data"] = config["data"] | {"num_folds": None, "fold": None}
    text = f"# Pooled over the {len(folds)} folds in this folder.\n{yaml.safe_dump(config, sort_keys=False)}"
    write_atomically(folder.config, [text.encode()])
    metrics = {**summarise(predictions, seed=seed, texts=texts), **_spread(figures)}
    metrics |= _pool_baselines(folder, [fold for fold in folds if answers[fold.path]], seed=seed)
    step = max(int(row.get("step", 0)) for row in figures)
    write_lines(folder.metrics, [{"step": step, NUM_MODELS: len(folds), **metrics}])
    write_lines(folder.predictions, (prediction.to_row() for prediction in predictions))
    if folds[0].pictures.is_dir():
        shutil.copytree(folds[0].pictures, folder.pictures, dirs_exist_ok=True)
    folder.finished.touch()
    return folder


def fold_notes(path: Path, metrics: Mapping[str, Any]) -> list[str]:
    """Messages for the pooled report: what is pooled, the spread over the folds, and how the folds differ."""
    folds = fold_folders(path)
    notes = [
        f"Figures are pooled over {len(folds)} models, each tested on subjects that it was not trained on; each "
        "subject was tested once"
    ]
    for key, value in metrics.items():
        label, _, name = key.removeprefix("eval/").partition("_fold_mean/")
        if name:
            low, high = (metrics[f"eval/{label}_fold_{side}/{name}"] for side in ("min", "max"))
            notes.append(f"{label} of {name} by fold: mean {value:.3g}, from {low:.3g} to {high:.3g}")
    flat = [dict(flatten(read_yaml(RunFolder(fold).config)[0])) for fold in folds]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in ("name", "data.fold"))
    changed = [key for key in keys if any(settings.get(key) != flat[0].get(key) for settings in flat)]
    return [*notes, *([f"The folds have different settings: {', '.join(changed)}"] if changed else [])]


def _read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of predictions; none for a fold whose subjects have no answers."""
    rows, num_broken = read_lines(path)
    if num_broken or not path.is_file():
        what = f"{num_broken} of {len(rows) + num_broken} lines are unreadable" if num_broken else "is missing"
        raise RunError(f"{path}: {what}; evaluate the fold again with: umbrella-eval {path.parent}")
    return rows


def _with_one_salt(path: Path, answers: Mapping[Path, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of all folds, with the hashes of the pooled folder; a subject in two folds is an error."""
    name_hash = pseudonyms(path)
    fold_of: dict[str, str] = {}
    for fold, rows in answers.items():
        names = names_by_hash([fold])

        def pooled(own: str, names: Mapping[str, str] = names) -> str:
            # Without the fold's table of names, its own hashes are kept.
            return name_hash(names[own]) if own in names else own

        for row in rows:
            name = names.get(row["subject"])
            key = row["subject"] if name is None else subject_key(name)
            if fold_of.setdefault(key, fold.name) != fold.name:
                raise RunError(
                    f"{path}: a subject is in {fold_of[key]} and {fold.name}, so the manifests have changed; "
                    "train all folds again under another name"
                )
            yield replace_hashes(row, by=pooled)


def _pool_baselines(folder: RunFolder, folds: Sequence[RunFolder], *, seed: int) -> dict[str, float]:
    """Figures of the baselines of all folds; their file is written, or removed if a fold has none."""
    if not folds or not all(fold.baselines.is_file() for fold in folds):
        folder.baselines.unlink(missing_ok=True)
        return {}
    from umbrella_train.baselines.compare import summarise_baselines  # late: imports scikit-learn

    rows = list(_with_one_salt(folder.path, {fold.path: _read_answers(fold.baselines) for fold in folds}))
    write_lines(folder.baselines, rows)
    predictions: dict[str, list[Prediction]] = {}
    for row in rows:
        predictions.setdefault(row["baseline"], []).append(Prediction.from_row(row))
    return summarise_baselines(predictions, seed=seed)


def _check_split(path: Path, folds: Sequence[RunFolder], configs: Sequence[Mapping[str, Any]]) -> None:
    values = [{key: _value_at(config, key) for key in (*_SAME_SPLIT, "data.fold")} for config in configs]
    for key in _SAME_SPLIT:
        if any(each[key] != values[0][key] for each in values):
            raise RunError(
                f"{path}: the folds have different {key}, so they are not of one split; train all folds again under "
                "another name"
            )
    num_folds = values[0]["data.num_folds"] if values else 0
    ready = {each["data.fold"] for fold, each in zip(folds, values, strict=True) if fold.finished.exists()}
    missing = [f"fold-{number}" for number in range(1, int(num_folds or 0) + 1) if number not in ready]
    if missing or not ready:
        raise RunError(
            f"{path}: not finished: {', '.join(missing) or 'any fold'}; train with: umbrella-train --folds {num_folds} "
            "--resume auto"
        )


def _value_at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _newest_figures(fold: RunFolder) -> Mapping[str, Any]:
    """The newest complete evaluation in a fold's metrics."""
    rows = [row for row in read_lines(fold.metrics)[0] if any(key.startswith("eval/questions/") for key in row)]
    return rows[-1] if rows else {}


def _spread(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean, minimum and maximum of the main figures, over the folds that have them."""
    spread: dict[str, float] = {}
    keys = dict.fromkeys(key for row in figures for key in row if key.startswith("eval/"))
    for key in keys:
        _, label, *rest = key.split("/")
        values = [row[key] for row in figures if row.get(key) is not None]
        if label in _MAIN and values:
            name = "/".join(rest)
            for side, value in (("mean", fmean(values)), ("min", min(values)), ("max", max(values))):
                spread[f"eval/{label}_fold_{side}/{name}"] = value
    return spread
