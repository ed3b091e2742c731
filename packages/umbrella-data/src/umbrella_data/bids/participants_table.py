"""Parser of participants tables: tab-separated as in BIDS, or comma-separated if the name ends in `.csv`.

Cells of a `.csv` file may be quoted. BIDS tables have no quoting: a quote in them is text.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.errors import ManifestError

# A subject, `sub-01`, and a session, `ses-02`; without a session, the subject as a whole.
Visit = tuple[str, str | None]

# In lower case; a cell such as "-" that is the code of a level is a value.
MISSING_CELLS = ("", "n/a", "na", "nan", "<na>", "#n/a", "null", "?", ".", "-")
_SUBJECT, _SESSION = "participant_id", "session_id"
_NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons"}
# The first bytes of .xlsx and .ods, which are ZIP archives, and of .xls.
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


@dataclass(frozen=True)
class ParticipantsTable:
    """The cells of one file.

    Attributes:
        path: The file.
        columns: Column names, from its first line, without blanks around them.
        rows: The cells of each visit by column. Subjects are written `sub-01`, even if the file has `Sub-01` or `01`,
            and sessions `ses-01`. The session is None if the table has no column `session_id` or no value in it.
        lines: The line number of each visit, from 1.
    """

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[Visit, Mapping[str, str]]
    lines: Mapping[Visit, int]


def read_table(path: Path, *, subject: str | None = None) -> ParticipantsTable:
    """Parse a file; blank lines are skipped.

    Args:
        path: A table of participants, one line for each subject or, with a column `session_id`, for each visit.
        subject: If given, the table is about the visits of this subject, as `sub-01_sessions.tsv` is.

    Raises:
        ManifestError: If the file is missing or a spreadsheet, or with all its problems: no column `participant_id`
            (`session_id` in a table of one subject), a duplicate column or visit, a line without a subject or with too
            many cells, the wrong separator, an unclosed quote.
    """
    if not path.is_file():
        raise ManifestError("no such file; give a table of participants", path=path)
    with path.open("rb") as file:
        if file.read(4) in _SPREADSHEETS:
            text = "a file of Excel or another spreadsheet; save the sheet as CSV (UTF-8, with commas), and give that"
            raise ManifestError(text, path=path)
    problems: list[str] = []
    rows: dict[Visit, Mapping[str, str]] = {}
    lines: dict[Visit, int] = {}
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    last = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as text_file:
            # Without `strict`, an unclosed quote would silently swallow the lines after it.
            reader = csv.DictReader(
                text_file,
                delimiter=separator,
                quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
                strict=True,
                restval="",
            )
            columns = tuple(name.strip() for name in reader.fieldnames or ())
            reader.fieldnames = columns
            problems += _header_problems(columns, separator, key=_SUBJECT if subject is None else _SESSION, path=path)
            last = reader.line_num
            for row in reader:
                last = reader.line_num
                extra: Sequence[str] = row.pop(None, ())
                if not any(cell.strip() for cell in (*row.values(), *extra)):
                    continue
                visit = _visit(row, subject)
                problem = _line_problem(visit, extra, columns, is_known=visit in rows, has_subject=subject is not None)
                if problem:
                    problems.append(f"line {last}: {problem}")
                else:
                    rows[visit] = row
                    lines[visit] = last
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error}; save the table as UTF-8", path=path) from error
    except csv.Error as error:
        # The parser notices an unclosed quote at the end of the file; the mistake follows the last line that it parsed.
        problems.append(f"after line {last}: cannot be parsed ({error}); look for an unclosed quote")
    if problems:
        raise ManifestError(problems, path=path)
    return ParticipantsTable(path, columns, rows, lines)


def name_of(visit: Visit) -> str:
    """A visit in a message: `sub-01`, or `sub-01 ses-02`."""
    return visit[0] if visit[1] is None else f"{visit[0]} {visit[1]}"


def _header_problems(columns: tuple[str, ...], separator: str, *, key: str, path: Path) -> list[str]:
    if key not in columns:
        raise ManifestError(f"line 1: {_wrong_header(columns, separator, key=key)}", path=path)
    # Columns without a name are ignored; spreadsheets leave several at the end.
    duplicates = sorted(column for column, count in Counter(columns).items() if column and count > 1)
    return [f"line 1: duplicate column {column!r}; rename or remove one" for column in duplicates]


def _visit(row: Mapping[str, str], subject: str | None) -> Visit:
    session = row.get(_SESSION, "").strip()
    return (
        subject or _with_prefix("sub-", row[_SUBJECT].strip()),
        None if session.lower() in MISSING_CELLS else _with_prefix("ses-", session),
    )


def _with_prefix(prefix: str, name: str) -> str:
    return prefix + (name[len(prefix) :] if name[: len(prefix)].lower() == prefix else name)


def _line_problem(
    visit: Visit, extra: Sequence[str], columns: tuple[str, ...], *, is_known: bool, has_subject: bool
) -> str | None:
    subject, session = visit
    if subject == "sub-":
        return f"{_SUBJECT} is empty"
    if session == "ses-" or (has_subject and session is None):
        return f"{_SESSION} is empty"
    if extra:
        return "more cells than line 1 has columns"
    if not is_known:
        return None
    if session is not None:
        return f"duplicate session {session} of {subject}"
    advice = "" if _SESSION in columns else f"; a table with a line for each visit needs the column {_SESSION}"
    return f"duplicate subject {subject}{advice}"


def _wrong_header(columns: tuple[str, ...], separator: str, *, key: str) -> str:
    others = [other for other in _NAMES if other != separator and len(columns) == 1 and other in columns[0]]
    if not others:
        what = "subjects" if key == _SUBJECT else "sessions"
        return f"no column {key!r} among {', '.join(columns)}; rename the column with the {what}"
    return (f"columns are separated by {_NAMES[others[0]]}; use {_NAMES[separator]} "
            "(commas in a .csv file, tabs in any other)")  # fmt: skip
