"""A table of participants as text: tab-separated as BIDS has it, or comma-separated where its name ends in `.csv`.

Cells in a `.csv` file may be quoted. BIDS has no quoting: between tabs a quote is text.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.errors import ManifestError

_KEY = "participant_id"
_NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons"}


@dataclass(frozen=True)
class ParticipantsTable:
    """The cells of one file.

    Attributes:
        path: The file.
        columns: The names in its first line.
        rows: The texts of each subject (`sub-01`, whether the file writes `sub-`, `Sub-` or neither) by column; blank
            lines are left out.
        lines: Where each subject stands, counted from 1.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]
    lines: Mapping[str, int]


def read_table(path: Path) -> ParticipantsTable:
    """Read a file.

    Raises:
        ManifestError: If there is no such file, or with every problem of it: no `participant_id`, a column named twice,
            a line without a subject, a subject twice, a line that is longer than the first one, another separator than
            its name says, a quote that does not close.
    """
    if not path.is_file():
        raise ManifestError("no such file; a table of participants is needed", path=path)
    problems: list[str] = []
    rows: dict[str, Mapping[str, str]] = {}
    lines: dict[str, int] = {}
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    last = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # An open quote takes in the lines after it; only `strict` makes an error of that.
            reader = csv.DictReader(
                file,
                delimiter=separator,
                quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
                strict=True,
                restval="",
            )
            columns = tuple(reader.fieldnames or ())
            if _KEY not in columns:
                raise ManifestError(f"line 1: {_wrong_header(columns, separator)}", path=path)
            # Columns without a name cannot be asked for; spreadsheets leave several at the end.
            twice = sorted(column for column, count in Counter(columns).items() if column and count > 1)
            problems += [f"line 1: column {column!r} is named twice; rename or remove one" for column in twice]
            last = reader.line_num
            for row in reader:
                last = reader.line_num
                extra = row.pop(None, [])
                if not any(cell.strip() for cell in (*row.values(), *extra)):
                    continue
                name = row.pop(_KEY).strip()
                subject = f"sub-{name[4:] if name[:4].lower() == 'sub-' else name}"
                if subject == "sub-":
                    problems.append(f"line {reader.line_num}: {_KEY} is empty")
                elif extra:
                    problems.append(f"line {reader.line_num}: more columns than line 1 names")
                elif subject in rows:
                    problems.append(f"line {reader.line_num}: {subject} is in the file twice")
                else:
                    rows[subject] = row
                    lines[subject] = reader.line_num
    except UnicodeDecodeError as error:
        raise ManifestError(f"cannot be read as a table in UTF-8: {error}", path=path) from error
    except csv.Error as error:
        # The reader stands where the quote had to close, which may be the file's end; the mistake is where it opens.
        problems.append(f"after line {last}: no table from here on, is there a quote that does not close? ({error})")
    if problems:
        raise ManifestError(problems, path=path)
    return ParticipantsTable(path, columns, rows, lines)


def _wrong_header(columns: tuple[str, ...], separator: str) -> str:
    others = [other for other in _NAMES if other != separator and len(columns) == 1 and other in columns[0]]
    if not others:
        return f"no column {_KEY!r} among {', '.join(columns)}"
    return (f"its columns are separated by {_NAMES[others[0]]}, not by {_NAMES[separator]}: "
            "a .csv file has commas, any other file tabs")  # fmt: skip
