"""Where each row of a manifest stands in its file: byte offsets, found without parsing JSON Lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CHUNK_BYTES = 1 << 24
_NEWLINE = ord("\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowIndex:
    """Byte ranges of the rows of one file; the file is opened on the first read of each process.

    Args:
        path: The file.
        starts: First byte of each row, shape (N,).
        stops: Byte after the last of each row, shape (N,).
        lines: Line of each row from 1, shape (N,); None where row i stands in line i + 1.
    """

    def __init__(
        self, path: Path, *, starts: NDArray[np.int64], stops: NDArray[np.int64], lines: NDArray[np.int64] | None
    ) -> None:
        self.path = path
        self._starts = starts
        self._stops = stops
        self._lines = lines
        self._file: int | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None and self._owner == os.getpid():
            os.close(self._file)

    def line(self, index: int) -> int:
        """Line of a row, from 1."""
        return index + 1 if self._lines is None else int(self._lines[index])

    def num_bytes(self, index: int) -> int:
        """Length of a row in bytes."""
        return int(self._stops[index] - self._starts[index])

    def read(self, index: int) -> bytes:
        """The bytes of a row."""
        if self._file is None:
            self._file, self._owner = os.open(self.path, os.O_RDONLY), os.getpid()
        # pread leaves no file position behind that threads or forked workers could disturb.
        return os.pread(self._file, self.num_bytes(index), int(self._starts[index]))


def index_rows(path: Path) -> RowIndex:
    """Index a `.json` file by the elements of its list, any other by its lines; blank lines are passed over.

    Raises:
        ValueError: If a `.json` file holds neither a list nor one object.
    """
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
    newlines = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    starts = np.concatenate([[skip], newlines + 1]).astype(np.int64)
    stops = np.concatenate([newlines, [position]]).astype(np.int64)
    lengths = stops - starts
    is_row = lengths >= 1
    with path.open("rb") as file:
        for line in np.flatnonzero(lengths == 1):  # "\r" of an empty line
            file.seek(starts[line])
            is_row[line] = file.read(1) != b"\r"
    in_order = bool(is_row[:-1].all()) and len(is_row) > 0
    lines = None if in_order else np.flatnonzero(is_row) + 1
    return RowIndex(path, starts=starts[is_row], stops=stops[is_row], lines=lines)


def _index_json_list(path: Path) -> RowIndex:
    text = path.read_bytes().decode("utf-8-sig")
    shift = path.stat().st_size - len(text.encode("utf-8"))  # a byte order mark, if any
    decoder = json.JSONDecoder()
    position = _skip_blanks(text, 0)
    if text[position : position + 1] == "{":
        return _index_one_object(path, text, position, shift)
    if text[position : position + 1] != "[":
        raise ValueError("a .json manifest must be one list of rows, or one row; name JSON Lines .jsonl")
    starts, stops, lines = [], [], []
    position = _skip_blanks(text, position + 1)
    num_bytes, num_lines, counted = shift, 1, 0
    while text[position : position + 1] not in ("]", ""):
        _, stop = decoder.raw_decode(text, position)
        num_bytes += len(text[counted:position].encode("utf-8"))
        num_lines += text.count("\n", counted, position)
        row_bytes = len(text[position:stop].encode("utf-8"))
        starts.append(num_bytes)
        stops.append(num_bytes + row_bytes)
        lines.append(num_lines)
        num_bytes += row_bytes
        num_lines += text.count("\n", position, stop)
        counted = stop
        position = _next_element(text, stop)
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        raise ValueError("the list of rows does not end with ']' alone; the file may be cut off")
    return RowIndex(
        path,
        starts=np.array(starts, dtype=np.int64),
        stops=np.array(stops, dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
    )


def _index_one_object(path: Path, text: str, position: int, shift: int) -> RowIndex:
    """A conversation with a file of its own, as the samples of UMBRELLA JSON have."""
    _, stop = json.JSONDecoder().raw_decode(text, position)
    if text[stop:].strip():
        raise ValueError("a .json manifest must be one list of rows, or one row; name JSON Lines .jsonl")
    start = shift + len(text[:position].encode("utf-8"))
    length = len(text[position:stop].encode("utf-8"))
    line = text.count("\n", 0, position) + 1
    starts, stops, lines = (np.array([value], dtype=np.int64) for value in (start, start + length, line))
    return RowIndex(path, starts=starts, stops=stops, lines=lines)


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _next_element(text: str, stop: int) -> int:
    position = _skip_blanks(text, stop)
    if text[position : position + 1] == ",":
        position = _skip_blanks(text, position + 1)
        if text[position : position + 1] == "]":
            raise ValueError("a comma stands before the closing ']'")
    elif text[position : position + 1] != "]":
        raise ValueError(f"a comma or ']' is missing after a row near character {stop}")
    return position
