"""The labels of one table: its columns are read as their descriptions say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umbrella_data.bids.age_unit import unit_key
from umbrella_data.bids.column_descriptions import parse_description, read_descriptions
from umbrella_data.bids.label_files import TableFiles
from umbrella_data.bids.label_values import ColumnReader, Kind, Label, LeftOut
from umbrella_data.bids.layout import MessageList
from umbrella_data.bids.participants_table import ParticipantsTable, Visit, name_of, read_table
from umbrella_data.errors import ManifestError


@dataclass(frozen=True)
class LabelColumns:
    """The columns to read besides `age` and `sex`.

    Attributes:
        choices: Names of categorical columns.
        numbers: Names of numeric columns, with their units; None takes the declared one.
        missing: Codes for missing values, each with its column; "" for all columns.
    """

    choices: tuple[str, ...] = ()
    numbers: Mapping[str, str | None] = field(default_factory=dict)
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """The choices and the numbers."""
        return (*self.choices, *self.numbers)

    def kind(self, column: str) -> Kind | None:
        """How a column is read; None if it has no labels."""
        if column in self.choices:
            return Kind.CHOICE
        if column in self.numbers:
            return Kind.NUMBER
        # A named column replaces equivalent ones: its labels differ, as `M` does from `male`.
        if self.task(column) in self.named:
            return None
        return {"age": Kind.AGE, "sex": Kind.SEX}.get(self.task(column))

    def task(self, column: str) -> str:
        """The task that a column has labels for."""
        if column in self.named:
            return column
        return "sex" if column.lower() == "gender" else column.lower()


@dataclass(frozen=True)
class LabelTable:
    """A table and the readers of its columns.

    Attributes:
        table: The cells.
        chosen: Which columns have labels.
        readers: The readers of those of its columns that have labels.
    """

    table: ParticipantsTable
    chosen: LabelColumns
    readers: Mapping[str, ColumnReader]

    @property
    def tasks(self) -> set[str]:
        """The tasks that its columns have labels for."""
        return {self.chosen.task(column) for column in self.readers}

    def labels(self, messages: MessageList, problems: list[str]) -> Iterator[tuple[Visit, dict[str, Label]]]:
        """Yield the labels of each visit by task; values without a label are added to `messages`.

        Equivalent columns, such as `sex` and `gender`, with different values are added to `problems`.
        """
        for visit, row in self.table.rows.items():
            labels: dict[str, Label] = {}
            source: dict[str, str] = {}
            for column, reader in self.readers.items():
                cell, task = row[column].strip(), self.chosen.task(column)
                if reader.is_missing(cell):
                    continue
                label = reader.read(cell)
                if isinstance(label, LeftOut):
                    messages.add(label.reason, f"{name_of(visit)}: {cell!r}")
                elif labels.setdefault(task, label) != label:
                    other = source[task]
                    problems.append(
                        f"line {self.table.lines[visit]}: {name_of(visit)}: column {other!r} is "
                        f"{row[other].strip()!r}, but the equivalent column {column!r} is {cell!r}; "
                        "correct or remove one"
                    )
                else:
                    source.setdefault(task, column)
            yield visit, labels


def read_group(files: Sequence[TableFiles], chosen: LabelColumns) -> list[LabelTable]:
    """Read tables with the same columns: codes for missing values are compared with the cells of all of them.

    Raises:
        ManifestError: With every problem of a table, or of the descriptions of its columns.
    """
    tables = [read_table(file.path, subject=file.subject) for file in files]
    cells: dict[str, list[str]] = defaultdict(list)
    for table in tables:
        for column in filter(chosen.kind, table.columns):
            cells[column] += [row[column].strip() for row in table.rows.values()]
    # Thousands of tables of visits have one description: a reader is kept for each column and JSON file.
    contents: dict[Path, dict[str, object]] = {}
    known: dict[tuple[str, Path | None], ColumnReader] = {}
    read = []
    for table, file in zip(tables, files, strict=True):
        contents |= {path: read_descriptions(path) for path in file.descriptions if path not in contents}
        problems: list[str] = []
        own: dict[str, ColumnReader] = {}
        for column in filter(chosen.kind, table.columns):
            source, entry = _entry(column, {path: contents[path] for path in file.descriptions})
            if (column, source) not in known:
                where = f"{source.name if source else table.path.name}: {column!r}"
                reader = _reader(column, entry, chosen, where=where, problems=problems)
                known[column, source] = reader.over(cells[column])
            own[column] = known[column, source]
        if problems:
            raise ManifestError(problems, path=table.path)
        read.append(LabelTable(table, chosen, own))
    return read


def _entry(column: str, files: Mapping[Path, Mapping[str, object]]) -> tuple[Path | None, object]:
    """The first file that describes a column, and what it says."""
    named = ((path, entries, name) for path, entries in files.items() for name in (column, column.lower()))
    return next(((path, entries[name]) for path, entries, name in named if name in entries), (None, {}))


def _reader(column: str, entry: object, chosen: LabelColumns, *, where: str, problems: list[str]) -> ColumnReader:
    kind = chosen.kind(column)
    assert kind is not None
    reader = ColumnReader(
        column,
        kind,
        parse_description(entry, where=where, problems=problems),
        missing=tuple(code for of_column, code in chosen.missing if of_column in ("", column)),
        given_unit=chosen.numbers.get(column),
    )
    given, declared = reader.given_unit, reader.declared_unit
    if given is not None and declared is not None and unit_key(given) != unit_key(declared):
        problems.append(f"{where}: its unit is {declared!r}, but --number gives {given!r}; use {declared!r}, or "
                        "correct the file")  # fmt: skip
    return reader
