"""Labels of subjects from `participants.tsv` or other tables, and the questions that they answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.bids.messages import MessageList, first_of
from umbrella_data.bids.participants_table import ParticipantsTable, read_table
from umbrella_data.bids.questions import AGE, SEX, Question, choice_question, number_question
from umbrella_data.errors import ManifestError

_MISSING = ("", "n/a", "na", "nan")
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


@dataclass(frozen=True)
class Participants:
    """The labels of all subjects.

    Attributes:
        labels: By subject (`sub-01`), then by task.
        questions: Those that at least one subject has a label for.
        messages: Values that were left out, one message for each column.
    """

    labels: Mapping[str, Mapping[str, str | float]]
    questions: tuple[Question, ...]
    messages: tuple[str, ...]

    def compare(self, subjects: Collection[str]) -> Iterator[str]:
        """Yield a message that compares the subjects of the table with `subjects`, those who have a scan."""
        if not self.labels:
            return
        without = [subject for subject in self.labels if subject not in subjects]
        unknown = sorted(set(subjects) - set(self.labels))
        message = f"{len(self.labels) - len(without)} of {len(self.labels)} subjects of the table have a scan"
        message += f"; without a scan: {first_of(without)}" if without else ""
        yield message + (f"; not in the table: {first_of(unknown)}" if unknown else "")


def read_participants(
    tables: Sequence[Path], *, choices: Sequence[str] = (), numbers: Mapping[str, str | None] | None = None
) -> Participants:
    """Read the labels `age` and `sex`, and those of the named columns.

    Args:
        tables: The files, joined by subject; may be empty.
        choices: Names of categorical columns.
        numbers: Names of numeric columns, with their units.

    Raises:
        ManifestError: With every problem of a file, see `participants_table.read_table`; if a named column is in no
            table; if two tables, or two equivalent columns of one (`sex` and `gender`), disagree about a subject.
    """
    numbers = numbers or {}
    parsed = [read_table(path) for path in tables]
    _check_columns(parsed, [*choices, *numbers])
    labels: dict[str, dict[str, str | float]] = {}
    messages = MessageList()
    for table in parsed:
        problems: list[str] = []
        for subject, found in _labels_of(table, choices=choices, numbers=numbers, messages=messages, problems=problems):
            joined = labels.setdefault(subject, {})
            problems += [
                f"{subject}: {task} is {label!r}, but {joined[task]!r} in an earlier table"
                for task, label in found.items()
                if joined.setdefault(task, label) != label
            ]
        if problems:
            raise ManifestError(problems, path=table.path)
    return Participants(labels, tuple(_questions(labels, choices, numbers)), tuple(messages))


def _check_columns(tables: Sequence[ParticipantsTable], named: Sequence[str]) -> None:
    columns = [column for table in tables for column in table.columns]
    problems = [f"line 1: no column {column!r} among {', '.join(columns)}" for column in named if column not in columns]
    if tables and problems:
        raise ManifestError(problems, path=", ".join(str(table.path) for table in tables))


def _labels_of(
    table: ParticipantsTable,
    *,
    choices: Sequence[str],
    numbers: Mapping[str, str | None],
    messages: MessageList,
    problems: list[str],
) -> Iterator[tuple[str, dict[str, str | float]]]:
    named = [*choices, *numbers]
    for subject, row in table.rows.items():
        labels: dict[str, str | float] = {}
        source: dict[str, str] = {}
        for column, text in row.items():
            value, task = text.strip(), _task(column, named=named)
            # A named column replaces equivalent ones: its labels differ, as `M` does from `male`.
            if value.lower() in _MISSING or (task in named and column != task):
                continue
            label = _label(column, value, is_choice=column in choices, is_number=column in numbers)
            if label is not None and labels.setdefault(task, label) != label:
                other = source[task]
                problems.append(
                    f"line {table.lines[subject]}: {subject}: column {other!r} is {row[other].strip()!r}, "
                    f"but the equivalent column {column!r} is {value!r}; correct or remove one"
                )
            elif label is not None:
                source.setdefault(task, column)
            elif _is_label_column(column, named=named):
                messages.add(f"invalid values of {column}, left out", f"{subject}: {value!r}")
        yield subject, labels


def _task(column: str, *, named: Sequence[str]) -> str:
    if column in named:
        return column
    return "sex" if column.lower() == "gender" else column.lower()


def _is_label_column(column: str, *, named: Sequence[str]) -> bool:
    return column in named or column.lower() in ("age", "sex", "gender")


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
        if len(options) > 1:  # a choice needs two different values
            questions.append(choice_question(column, options=options))
    questions += [number_question(column, unit=unit) for column, unit in numbers.items() if column in found]
    return questions
