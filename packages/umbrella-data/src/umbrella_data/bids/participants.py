"""Labels of subjects and visits from `participants.tsv` or other tables, and the questions that they answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from umbrella_data.bids.age_unit import unit_key
from umbrella_data.bids.label_files import TableFiles
from umbrella_data.bids.label_table import LabelColumns, LabelTable, read_group
from umbrella_data.bids.label_values import Label, option_key
from umbrella_data.bids.layout import MessageList, first_of
from umbrella_data.bids.participants_table import Visit, name_of
from umbrella_data.bids.questions import AGE, SEX, Question, choice_question, number_question
from umbrella_data.errors import ManifestError


@dataclass(frozen=True)
class Participants:
    """The labels of all subjects and visits.

    Attributes:
        labels: By subject and session, then by task. Without a session, labels are of the subject as a whole.
        of_visits: The tasks that the tables have for each visit of a subject; labels of the subject as a whole are none
            of a visit.
        questions: Those that at least one subject has a label for.
        messages: Values that were left out, one message for each reason.
    """

    labels: Mapping[Visit, Mapping[str, Label]]
    of_visits: Mapping[str, frozenset[str]]
    questions: tuple[Question, ...]
    messages: tuple[str, ...]

    def labels_of(self, subject: str, session: str | None) -> dict[str, Label]:
        """The labels of a scan.

        Those of its visit, and those of its subject as a whole for columns that no visit of the subject has: a visit
        whose own cell is missing has no label.
        """
        if session is None:
            # A tree without sessions, and a table with them: a subject's only visit must be the scanned one.
            sessions = self._sessions.get(subject, [None])
            return dict(self.labels.get((subject, sessions[0] if len(sessions) == 1 else None), {}))
        whole = self.labels.get((subject, None), {})
        of_visits = self.of_visits.get(subject, frozenset())
        kept = {task: label for task, label in whole.items() if task not in of_visits}
        return {**kept, **self.labels.get((subject, session), {})}

    @cached_property
    def _sessions(self) -> dict[str, list[str | None]]:
        """The sessions of each subject's lines; None for a line of the subject as a whole."""
        sessions: dict[str, list[str | None]] = defaultdict(list)
        for subject, session in self.labels:
            sessions[subject].append(session)
        return sessions

    def compare(self, scans: Sequence[Visit]) -> Iterator[str]:
        """Yield messages that compare the tables with the scans, given by the subject and session of each."""
        if not self.labels:
            return
        known, scanned = (dict.fromkeys(subject for subject, _ in visits) for visits in (self.labels, scans))
        without = [subject for subject in known if subject not in scanned]
        unknown = sorted(subject for subject in scanned if subject not in known)
        message = f"{len(known) - len(without)} of {len(known)} subjects of the table have a scan that is used"
        message += f"; without one: {first_of(without)}" if without else ""
        yield message + (f"; not in the table: {first_of(unknown)}" if unknown else "")
        yield from self._compare_visits(scans)

    def _compare_visits(self, scans: Sequence[Visit]) -> Iterator[str]:
        messages = MessageList()
        sessions: dict[str, set[str | None]] = defaultdict(set)
        for visit in scans:
            subject, session = visit
            sessions[subject].add(session)
            if subject in self.of_visits and visit not in self.labels and (session or len(self._sessions[subject]) > 1):
                messages.add("scans without a line of their visit, whereas other visits of the subject have one",
                             name_of(visit))  # fmt: skip
        for subject, of_subject in sessions.items():
            ages = {task for task in self.labels.get((subject, None), {}) if task.lower() == "age"}
            if len(of_subject - {None}) > 1 and ages - self.of_visits.get(subject, frozenset()):
                messages.add("subjects with one age for several visits, asked about each of them: give the age at each "
                             "visit in sub-*_sessions.tsv, or in lines with a session_id", subject)  # fmt: skip
        yield from messages


def read_participants(
    groups: Sequence[Sequence[TableFiles]],
    *,
    choices: Sequence[str] = (),
    numbers: Mapping[str, str | None] | None = None,
    missing: Sequence[str] = (),
) -> Participants:
    """Read the labels `age` and `sex`, and those of the named columns.

    Args:
        groups: The files, see `label_files.find_label_files`, joined by subject and session; may be empty.
        choices: Names of categorical columns.
        numbers: Names of numeric columns, with their units; None takes the unit that a JSON file declares.
        missing: Codes for missing values, `-9` in all columns or `age=-9` in one.

    Raises:
        ManifestError: With every problem of a file, see `participants_table.read_table` and
            `column_descriptions.parse_description`; if a named column is in no table; if the unit of a column is
            another one than that of its JSON file or of another table; if two tables, or two equivalent columns of one
            (`sex` and `gender`), disagree about a visit.
    """
    codes = [text.split("=", maxsplit=1) if "=" in text else ("", text) for text in missing]
    columns = LabelColumns(tuple(choices), dict(numbers or {}), tuple((column, code) for column, code in codes))
    tables = [table for group in groups for table in read_group(group, columns)]
    _check_columns(tables, [*columns.named, *dict.fromkeys(column for column, _ in columns.missing if column)])
    labels: dict[Visit, dict[str, Label]] = {}
    of_visits: dict[str, set[str]] = defaultdict(set)
    messages = MessageList()
    for table in tables:
        problems: list[str] = []
        for visit, found in table.labels(messages, problems):
            joined = labels.setdefault(visit, {})
            problems += [
                f"{name_of(visit)}: {task} is {label!r}, but {joined[task]!r} in an earlier table"
                for task, label in found.items()
                if option_key(joined.setdefault(task, label)) != option_key(label)
            ]
            if visit[1] is not None:
                of_visits[visit[0]] |= table.tasks
        if problems:
            raise ManifestError(problems, path=table.table.path)
    for column in columns.choices:
        _merge_spellings(column, labels, messages)
    questions = tuple(_questions(labels, columns, _units(tables, columns.numbers)))
    return Participants(
        labels, {name: frozenset(tasks) for name, tasks in of_visits.items()}, questions, tuple(messages)
    )


def _merge_spellings(column: str, labels: Mapping[Visit, dict[str, Label]], messages: MessageList) -> None:
    """Replace the spellings of one option, `Control` and `control`, by the most frequent one."""
    values = [of_visit[column] for of_visit in labels.values() if column in of_visit]
    kept: dict[str | float, Label] = {}
    for value, _ in Counter(values).most_common():  # equal counts: in the order of the table
        option = kept.setdefault(option_key(value), value)
        if option != value:
            messages.add(f"spellings of {column} that are the same answer, merged", f"{value!r} as {option!r}")
    for of_visit in labels.values():
        if column in of_visit:
            of_visit[column] = kept[option_key(of_visit[column])]


def _check_columns(tables: Sequence[LabelTable], named: Sequence[str]) -> None:
    columns = list(dict.fromkeys(column for table in tables for column in table.table.columns))
    problems = [f"line 1: no column {column!r} among {', '.join(columns)}" for column in named if column not in columns]
    if tables and problems:
        raise ManifestError(problems, path=_joined(tables))


def _units(tables: Sequence[LabelTable], numbers: Mapping[str, str | None]) -> dict[str, str | None]:
    """The units of the number columns, which must be the same in every table."""
    problems: list[str] = []
    units = dict(numbers)
    for column in numbers:
        found = [table.readers[column].unit for table in tables if column in table.readers]
        spellings = {unit_key(unit): unit for unit in reversed(found) if unit is not None}
        if len(spellings) > 1:
            units_text = " and ".join(map(repr, spellings.values()))
            problems.append(f"column {column!r}: units {units_text} in several tables; convert one of them")
        units[column] = units[column] or next(iter(spellings.values()), None)
    if problems:
        raise ManifestError(problems, path=_joined(tables))
    return units


def _joined(tables: Sequence[LabelTable]) -> str:
    return ", ".join(str(table.table.path) for table in tables)


def _questions(
    labels: Mapping[Visit, Mapping[str, Label]], columns: LabelColumns, units: Mapping[str, str | None]
) -> list[Question]:
    found = {task for of_visit in labels.values() for task in of_visit}
    questions = [question for question in (AGE, SEX) if question.task in found - set(columns.named)]
    for column in columns.choices:
        options = tuple(sorted({str(of_visit[column]) for of_visit in labels.values() if column in of_visit}))
        if len(options) > 1:  # a choice needs two different values
            questions.append(choice_question(column, options=options))
    questions += [number_question(column, unit=unit) for column, unit in units.items() if column in found]
    return questions
