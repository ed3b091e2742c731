"""`participants.tsv` of a BIDS tree: each subject's labels, and the questions that they answer."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.errors import ManifestError
from umbrella_data.questions import AGE, SEX, Question, choice_question, number_question

_MISSING = ("", "n/a", "na", "nan")
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


@dataclass(frozen=True)
class Participants:
    """The labels of a tree.

    Attributes:
        labels: By subject (`sub-01`), then by task.
        questions: The questions that at least one subject has a label for.
        notes: Values that were left out, one sentence each.
    """

    labels: Mapping[str, Mapping[str, str | float]]
    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def read_participants(
    path: Path, *, choices: Sequence[str] = (), numbers: Mapping[str, str | None] | None = None
) -> Participants:
    """Read `age` and `sex`, and other columns as asked.

    Args:
        path: The file; where there is none, there are no labels.
        choices: Columns that hold one of a few texts.
        numbers: Columns that hold numbers, with their units.

    Raises:
        ManifestError: With every problem of the file: no `participant_id`, a subject twice, a column that is not there.
    """
    numbers = numbers or {}
    if not path.is_file():
        if choices or numbers:
            raise ManifestError(f"no such file; it should hold {', '.join([*choices, *numbers])}", path=path)
        return Participants({}, (), ())
    rows = _rows(path, columns=[*choices, *numbers])
    labels: dict[str, dict[str, str | float]] = {subject: {} for subject in rows}
    notes: list[str] = []
    for subject, row in rows.items():
        for column, value in row.items():
            if value.strip().lower() in _MISSING:
                continue
            label = _label(column, value.strip(), is_choice=column in choices, is_number=column in numbers)
            if label is not None:
                labels[subject][_task(column, chosen=[*choices, *numbers])] = label
            elif _is_known(column, chosen=[*choices, *numbers]):
                notes.append(f"{subject}: {column} {value!r} is no label that can be read; left out")
    return Participants(labels, tuple(_questions(labels, choices, numbers)), tuple(notes))


def _rows(path: Path, *, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    problems: list[str] = []
    rows: dict[str, dict[str, str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", restval="n/a")
        header = reader.fieldnames or []
        problems += [
            f"line 1: no column {column!r} among {', '.join(header)}"
            for column in ("participant_id", *columns)
            if column not in header
        ]
        for row in reader if not problems else ():
            name = (row.pop("participant_id") or "").strip()
            subject = name if name.startswith("sub-") else f"sub-{name}"
            if None in row:
                problems.append(f"line {reader.line_num}: more columns than line 1 names")
            elif subject in rows:
                problems.append(f"line {reader.line_num}: {subject} stands in the file twice")
            else:
                rows[subject] = row
    if problems:
        raise ManifestError(problems, path=path)
    return rows


def _task(column: str, *, chosen: Sequence[str]) -> str:
    if column in chosen:
        return column
    return "sex" if column.lower() == "gender" else column.lower()


def _is_known(column: str, *, chosen: Sequence[str]) -> bool:
    return column in chosen or column.lower() in ("age", "sex", "gender")


def _label(column: str, value: str, *, is_choice: bool, is_number: bool) -> str | float | None:
    if is_choice:
        return value
    if not is_number and column.lower() in ("sex", "gender"):
        return _SEXES.get(value.lower())
    if not is_number and column.lower() != "age":
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _questions(
    labels: Mapping[str, Mapping[str, str | float]], choices: Sequence[str], numbers: Mapping[str, str | None]
) -> list[Question]:
    found = {task for of_subject in labels.values() for task in of_subject}
    questions = [question for question in (AGE, SEX) if question.task in found - {*choices, *numbers}]
    for column in choices:
        options = tuple(sorted({str(of_subject[column]) for of_subject in labels.values() if column in of_subject}))
        if len(options) > 1:  # where all are alike there is nothing to ask
            questions.append(choice_question(column, options=options))
    questions += [number_question(column, unit=unit) for column, unit in numbers.items() if column in found]
    return questions
