"""Byte offsets of the rows of a manifest file; JSON Lines are not parsed to find them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from umbrella_data.files.look_alikes import START_BYTES
from umbrella_data.files.mapped_arrays import Arrays
from umbrella_data.manifest.row_json import TOO_DEEP, check_start, decode_text

_CHUNK_BYTES = 1 << 22
_MAX_ROW_BYTES = (1 << 32) - 1
_NEWLINE = ord("\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowIndex:
    """Byte ranges of the rows of one file, for random access; each process opens the file on its first read.

    Args:
        path: The file.
        arrays: `starts` (N,) int64, the first byte of each row; `lengths` (N,) uint32, its bytes; `lines` (N,) int64,
            its line from 1, which may be missing if row i is in line i + 1.
    """

    def __init__(self, path: Path, *, arrays: Arrays) -> None:
        self.path = path
        self.arrays = arrays
        self._file: int | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self.arrays["starts"])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None and self._owner == os.getpid():
            os.close(self._file)

    def line(self, index: int) -> int:
        """Line of a row, from 1."""
        return int(self.arrays["lines"][index]) if "lines" in self.arrays else index + 1

    def select(self, rows: NDArray[np.int64]) -> RowIndex:
        """The index of some rows, (N,), in this order."""
        lines = self.arrays["lines"][rows] if "lines" in self.arrays else rows + 1
        arrays = {name: self.arrays[name][rows] for name in ("starts", "lengths")}
        return RowIndex(self.path, arrays={**arrays, "lines": lines})

    def read(self, index: int) -> bytes:
        """The bytes of a row."""
        if self._file is None:
            self._file, self._owner = os.open(self.path, os.O_RDONLY), os.getpid()
        # pread has no file position, which threads and forked workers would share.
        return os.pread(self._file, int(self.arrays["lengths"][index]), int(self.arrays["starts"][index]))


def index_rows(path: Path) -> RowIndex:
    """Index a `.json` file by the elements of its list, any other file by its lines; blank lines are skipped.

    Raises:
        ValueError: If the file is not JSON in UTF-8, or a `.json` file is neither a list nor one object.
    """
    with path.open("rb") as file:
        check_start(file.read(START_BYTES))
    if path.suffix == ".json":
        return _index_json_list(path)
    return _index_lines(path)


def _index_lines(path: Path) -> RowIndex:
    found: list[NDArray[np.int64]] = []
    position = 0
    with path.open("rb") as file:
        skip = len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
            found.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == _NEWLINE) + position)
            position += len(chunk)
    bounds = np.concatenate([[skip - 1], *found, [position]], dtype=np.int64)
    found.clear()
    lengths = _to_lengths(np.diff(bounds) - 1)
    starts = bounds[:-1] + 1
    is_row = lengths >= 1
    with path.open("rb") as file:
        for line in np.flatnonzero(lengths == 1):  # "\r" of an empty line
            file.seek(starts[line])
            is_row[line] = file.read(1) != b"\r"
    rows = np.flatnonzero(is_row)
    if len(rows) == 0 or rows[-1] == len(rows) - 1:  # no gap: row i is in line i + 1
        return RowIndex(path, arrays={"starts": starts[: len(rows)], "lengths": lengths[: len(rows)]})
    return RowIndex(path, arrays={"starts": starts[rows], "lengths": lengths[rows], "lines": rows + 1})


def _to_lengths(lengths: NDArray[np.int64]) -> NDArray[np.uint32]:
    if len(lengths) and int(lengths.max()) > _MAX_ROW_BYTES:
        raise ValueError(f"a row has {int(lengths.max())} bytes, too many; write JSON Lines, one row per line")
    return lengths.astype(np.uint32)


def _index_json_list(path: Path) -> RowIndex:
    content = path.read_bytes()
    shift = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    text = _decode_lines(content[shift:])
    position = _skip_blanks(text, 0)
    is_list = text[position : position + 1] == "["
    spans: list[tuple[int, int]] = []
    if is_list:
        position = _skip_blanks(text, position + 1)
        while text[position : position + 1] not in ("]", ""):
            stop = _end_of_value(text, position)
            spans.append((position, stop))
            position = _next_element(text, stop)
        if text[position : position + 1] != "]" or text[position + 1 :].strip():
            raise ValueError(f"line {_line_of(text, position)}: the list of rows does not end with ']'; the file may "
                             "be truncated")  # fmt: skip
    elif text[position : position + 1] == "{":  # one conversation, as in UMBRELLA JSON
        spans.append((position, _end_of_value(text, position)))
    if not is_list and (not spans or text[spans[0][1] :].strip()):
        raise ValueError("a .json manifest must be one list of rows or one row; rename a file of JSON Lines to .jsonl")
    starts, lengths, lines = [], [], []
    num_bytes, num_lines, counted = shift, 1, 0
    for start, stop in spans:
        num_bytes += len(text[counted:start].encode("utf-8"))
        num_lines += text.count("\n", counted, start)
        starts.append(num_bytes)
        lengths.append(len(text[start:stop].encode("utf-8")))
        lines.append(num_lines)
        num_bytes += lengths[-1]
        num_lines += text.count("\n", start, stop)
        counted = stop
    arrays: Arrays = {
        "starts": np.array(starts, dtype=np.int64),
        "lengths": _to_lengths(np.array(lengths, dtype=np.int64)),
        "lines": np.array(lines, dtype=np.int64),
    }
    return RowIndex(path, arrays=arrays)


def _decode_lines(content: bytes) -> str:
    """Decode UTF-8; an error has its line."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            decode_text(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return content.decode("utf-8")


def _end_of_value(text: str, position: int) -> int:
    """The position after the JSON value that begins at a position; its keys and texts are checked on access."""
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        problem = TOO_DEEP if isinstance(error, RecursionError) else error
        raise ValueError(f"line {_line_of(text, position)}: {problem}") from error


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _next_element(text: str, stop: int) -> int:
    position = _skip_blanks(text, stop)
    if text[position : position + 1] == ",":
        position = _skip_blanks(text, position + 1)
        if text[position : position + 1] == "]":
            raise ValueError(f"line {_line_of(text, position)}: a comma before the closing ']'; remove it")
    elif text[position : position + 1] != "]":
        raise ValueError(f"line {_line_of(text, stop)}: a comma or ']' is missing after a row")
    return position
