"""Compares two evaluated runs on the subjects that both have; nothing is evaluated again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umbrella_data.manifest.sample import subject_key
from umbrella_data.privacy import TABLE_NAME, names_by_hash, replace_hashes
from umbrella_train.errors import RunError
from umbrella_train.evaluation.paired import Difference, Pair, Row, is_answered, paired_differences
from umbrella_train.run_folder import read_lines

_KEYS = ("subject", "task", "modality", "condition", "type", "answer", "generated", "score")

# Rows by modality, task and type, then by subject.
_Groups = Mapping[tuple[str, str, str], Mapping[str, Sequence[Row]]]


@dataclass(frozen=True)
class Comparison:
    """Two runs on one task.

    Attributes:
        name: Modality and task, as in `T1/sex`.
        differences: By the label of the figure; the first run's value minus the second one's.
        num_subjects: Subjects that are compared.
        only_in_one: Subjects that one run alone has.
        left_out: Rows of the common subjects that are not compared: the runs have another number of rows of the
            subject, or other right answers, or a model gave no number.
    """

    name: str
    differences: Mapping[str, Difference] = field(repr=False)
    num_subjects: int
    only_in_one: int
    left_out: int


def compare_runs(first: Path, second: Path, *, seed: int = 0) -> list[Comparison]:
    """Compare two runs, or folders with the folds of runs, by their answers with the own scans.

    Subjects are paired by name, through the table of names next to each run's salt.

    Args:
        first: The folder of a run, or a folder whose folders are runs.
        second: Another one.
        seed: Seed of resamples and permutations.

    Returns:
        A comparison for each modality and task that both runs have with a subject in common.

    Raises:
        RunError: A folder has no predictions, damaged ones, or no table of names; or nothing is in common.
    """
    ours, theirs = _read_groups(first), _read_groups(second)
    comparisons = []
    for key in sorted(ours.keys() & theirs.keys()):
        own, other = ours[key], theirs[key]
        common = sorted(own.keys() & other.keys())
        pairs = {subject: _pairs(own[subject], other[subject]) for subject in common}
        rows = [(pair, subject) for subject, members in pairs.items() for pair in members]
        differences = paired_differences(
            [pair for pair, _ in rows], subjects=[subject for _, subject in rows], seed=seed
        )
        if common:
            num_rows = sum(max(len(own[subject]), len(other[subject])) for subject in common)
            comparisons.append(
                Comparison(
                    "/".join(key[:2]),
                    differences,
                    num_subjects=sum(bool(members) for members in pairs.values()),
                    only_in_one=len(own.keys() ^ other.keys()),
                    left_out=num_rows - len(rows),
                )
            )
    if not comparisons:
        raise RunError(
            f"{first} and {second} have no subject with the same modality and task in common; compare runs that were "
            "evaluated on the same subjects"
        )
    return comparisons


def _pairs(own: Sequence[Row], other: Sequence[Row]) -> list[Pair]:
    """The rows of one subject, in pairs with the same right answer; none if the rows are not the same questions."""
    # The order of the manifests may differ, and the words of the questions.
    first, second = (sorted(rows, key=lambda row: str(row["answer"])) for rows in (own, other))
    if [row["answer"] for row in first] != [row["answer"] for row in second]:
        return []
    return [pair for pair in zip(first, second, strict=True) if is_answered(pair[0]) and is_answered(pair[1])]


def _read_groups(folder: Path) -> _Groups:
    files = [path for path in (folder / "predictions.jsonl", *_folds(folder)) if path.is_file()]
    if not files:
        raise RunError(f"{folder}: has no predictions.jsonl; evaluate the run first: umbrella-eval {folder}")
    if files[0].parent == folder:
        files = files[:1]  # the folds are pooled already
    names = names_by_hash([folder, *(path.parent for path in _folds(folder, TABLE_NAME))])
    if not names:
        raise RunError(
            f"{folder / TABLE_NAME}: is missing or empty. It has the names of the subjects, by which two runs are "
            f"compared. Copy it from where the run was evaluated, or evaluate the run here: umbrella-eval {folder}"
        )
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    unknown = set()
    for path in files:
        rows, num_broken = read_lines(path)
        num_broken += sum(any(key not in row for key in _KEYS) for row in rows)
        if num_broken:
            raise RunError(f"{path}: {num_broken} lines are damaged; evaluate the run again: umbrella-eval {folder}")
        for row in rows:
            if row["condition"] == "accuracy" and row["subject"] in names:
                key = (row["modality"], row["task"], row["type"])
                # The runs have other hashes in their texts, too.
                named = replace_hashes(row, by=lambda own: names.get(own, own))
                groups[key][subject_key(names[row["subject"]])].append(named)
            elif row["condition"] == "accuracy":
                unknown.add(row["subject"])
    if unknown:
        raise RunError(
            f"{folder / TABLE_NAME}: lacks {len(unknown)} subjects of predictions.jsonl. Copy it from where the run "
            f"was evaluated, or evaluate the run here: umbrella-eval {folder}"
        )
    return groups


def _folds(folder: Path, name: str = "predictions.jsonl") -> list[Path]:
    return sorted(folder.glob(f"*/{name}"))


def describe_differences(first: Path, second: Path, *, as_json: bool) -> str:
    """A table of `compare_runs` for a terminal, or its `comparison_metrics` as JSON."""
    comparisons = compare_runs(first, second)
    if as_json:
        return json.dumps(comparison_metrics(comparisons), indent=1)
    return comparison_table(comparisons, names=(str(first), str(second)))


def comparison_metrics(comparisons: Sequence[Comparison]) -> dict[str, float | None]:
    """The comparisons by key: `against/LABEL/NAME` is the difference; bounds that do not exist are None.

    Others are `against/LABEL_lower/NAME`, `_upper`, `_p`, `_first` and `_second` (the figure of each run), and
    `against/subjects/NAME`, `against/only_in_one/NAME`, `against/left_out/NAME`.
    """
    metrics: dict[str, float | None] = {}
    for comparison in comparisons:
        for label, difference in comparison.differences.items():
            values = {
                "": difference.figure.value,
                "_lower": difference.figure.lower,
                "_upper": difference.figure.upper,
                "_p": difference.p,
                "_first": difference.values[0],
                "_second": difference.values[1],
            }
            metrics |= {
                f"against/{label}{end}/{comparison.name}": value if math.isfinite(value) else None
                for end, value in values.items()
            }
        for label in ("num_subjects", "only_in_one", "left_out"):
            metrics[f"against/{label.removeprefix('num_')}/{comparison.name}"] = getattr(comparison, label)
    return metrics


def comparison_table(comparisons: Sequence[Comparison], *, names: tuple[str, str]) -> str:
    """The comparisons as text.

    Args:
        comparisons: From `compare_runs`.
        names: Names of the two runs.
    """
    lines = [["", "", *names, "difference (95 % interval)", "p", "subjects"]]
    notes = []
    for each in comparisons:
        for label, difference in each.differences.items():
            values = [f"{value:.3g}" for value in difference.values]
            figure = difference.figure
            bounds = f"{figure.lower:+.3g} to {figure.upper:+.3g}" if math.isfinite(figure.lower) else "no interval"
            interval = f"{figure.value:+.3g} ({bounds})"
            lines.append([each.name, label, *values, interval, f"{difference.p:.2g}", f"{each.num_subjects}"])
        if each.only_in_one:
            notes.append(f"{each.name}: {each.only_in_one} subjects are in one of the runs only")
        if each.left_out:
            notes.append(
                f"{each.name}: {each.left_out} rows are left out: the runs have other rows or right answers of the "
                "subject, or one has no number"
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}" for place, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join([*table, "error, brier: lower is better", *notes])
