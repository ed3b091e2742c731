"""Parser of participants tables: tab-separated as in BIDS, or comma-separated if the name ends in `.csv`.

Cells of a `.csv` file may be quoted. BIDS tables have no quoting: a quote in them is text.
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
        columns: Column names, from its first line.
        rows: The cells of each subject by column. Subjects are written `sub-01`, even if the file has `Sub-01` or `01`.
        lines: The line number of each subject, from 1.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]
    lines: Mapping[str, int]


def read_table(path: Path) -> ParticipantsTable:
    """Parse a file; blank lines are skipped.

    Raises:
        ManifestError: If the file is missing, or with all its problems: no column `participant_id`, a duplicate column
            or subject, a line without a subject or with too many cells, the wrong separator, an unclosed quote.
    """
    if not path.is_file():
        raise ManifestError("no such file; give a table of participants", path=path)
    problems: list[str] = []
    rows: dict[str, Mapping[str, str]] = {}
    lines: dict[str, int] = {}
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    last = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Without `strict`, an unclosed quote would silently swallow the lines after it.
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
            # Columns without a name are ignored; spreadsheets leave several at the end.
            duplicates = sorted(column for column, count in Counter(columns).items() if column and count > 1)
            problems += [f"line 1: duplicate column {column!r}; rename or remove one" for column in duplicates]
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
                    problems.append(f"line {reader.line_num}: more cells than line 1 has columns")
                elif subject in rows:
                    problems.append(f"line {reader.line_num}: duplicate subject {subject}")
                else:
                    rows[subject] = row
                    lines[subject] = reader.line_num
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error}; save the table as UTF-8", path=path) from error
    except csv.Error as error:
        # The parser notices an unclosed quote at the end of the file; the mistake follows the last line that it parsed.
        problems.append(f"after line {last}: cannot be parsed ({error}); look for an unclosed quote")
    if problems:
        raise ManifestError(problems, path=path)
    return ParticipantsTable(path, columns, rows, lines)


def _wrong_header(columns: tuple[str, ...], separator: str) -> str:
    others = [other for other in _NAMES if other != separator and len(columns) == 1 and other in columns[0]]
    if not others:
        return f"no column {_KEY!r} among {', '.join(columns)}"
    return (f"columns are separated by {_NAMES[others[0]]}; use {_NAMES[separator]} "
            "(commas in a .csv file, tabs in any other)")  # fmt: skip
