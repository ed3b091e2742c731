"""Samples with unusable scans: logged by name, listed by hash in a file, counted over all processes, and replaced."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, UmbrellaDataError
from umbrella_data.manifest.row_columns import RowFacts
from umbrella_data.privacy import pseudonyms
from umbrella_data.seeding import derive_seed

logger = logging.getLogger(__name__)

LIST_NAME = "bad_scans.jsonl"

_WINDOW = 65_536  # rows searched at a time
_MAX_MEASURED = 64  # candidates among which a short one is preferred
_STREAM = 2


class TooManyBadScansError(UmbrellaDataError):
    """More samples than allowed have unusable scans."""


@dataclass(frozen=True, kw_only=True)
class BadScan:
    """A skipped sample and the error of its scan.

    Attributes:
        manifest: Path of its manifest.
        line: Its line in the manifest.
        num_rows: Number of samples of the manifest.
        subject: Subject as named in the manifest.
        error: Error of the scan.
    """

    manifest: Path
    line: int
    num_rows: int
    subject: str
    error: ScanError


class BadScanList:
    """Counts samples with unusable scans, and stops a run if there are too many.

    Can be pickled for loader workers: all processes of a run append to one file and count its lines.

    Args:
        max_fraction: Maximum fraction of a manifest's samples that may be skipped, 0 to 1.
        folder: Folder of the list and the salt of its hashes; with None each process counts its own samples only.

    Raises:
        ValueError: If `max_fraction` is not from 0 to 1.
    """

    def __init__(self, *, max_fraction: float, folder: str | os.PathLike[str] | None = None) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_fraction is {max_fraction}; it must be from 0 to 1")
        self.max_fraction = max_fraction
        self.folder = None if folder is None else Path(folder)
        self._seen: set[tuple[str, int]] = set()

    def add(self, bad: BadScan) -> None:
        """Record a sample; a sample is counted once.

        Raises:
            TooManyBadScansError: If more than the allowed fraction is skipped; its cause is the error of the scan.
        """
        if (str(bad.manifest), bad.line) in self._seen:
            return
        self._seen.add((str(bad.manifest), bad.line))
        # As text: a log handler that stores records would keep the traceback of the error, and so its voxels, alive.
        logger.warning("skipped: %s, line %d, subject %s: %s", bad.manifest, bad.line, bad.subject, str(bad.error))
        if self.folder is None:
            count = sum(manifest == str(bad.manifest) for manifest, _ in self._seen)
        else:
            count = self._append(self.folder, bad)
        if count > self.max_fraction * bad.num_rows:
            raise TooManyBadScansError(
                f"{bad.manifest}: {count} of {bad.num_rows} samples have unusable scans, more than max_fraction "
                f"{self.max_fraction:g} (data.max_bad_fraction in a run's config); latest: {bad.error}. "
                "List all with `umbrella-data check`, then fix or remove them"
            ) from bad.error

    def _append(self, folder: Path, bad: BadScan) -> int:
        """Append a line, and return the number of samples of this manifest in the file."""
        name_hash = pseudonyms(folder)
        path = folder / LIST_NAME
        manifest = name_hash(str(bad.manifest))
        key = [manifest, bad.line]
        if key not in _keys(path):
            row = {
                "manifest": manifest,
                "line": bad.line,
                "subject": name_hash(bad.subject),
                "scan": name_hash(bad.error.path),
                "reason": str(bad.error.reason),
            }
            # One write with O_APPEND: lines of several processes do not interleave.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, (json.dumps(row) + "\n").encode())
            finally:
                os.close(descriptor)
        # Two processes may have added the same sample at the same time.
        return len({tuple(found) for found in _keys(path) if found[0] == manifest})


def _keys(path: Path) -> list[list[str | int]]:
    if not path.exists():
        return []
    keys = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            keys.append([row["manifest"], row["line"]])
        except (ValueError, KeyError, TypeError):
            continue  # truncated by a crash
    return keys


def replacements(row: int, *, index: int, facts: RowFacts, seed: int, length: Callable[[int], int]) -> Iterator[int]:
    """Rows that can replace one with an unusable scan, best first, each once: a pure function of seed and index.

    They hold the same modalities in the same order, so that batches by modality stay valid. Among each 64 candidates,
    those that are not longer than the replaced row come first, so that the batch stays within its token budget.

    Args:
        row: The row to replace.
        index: The virtual index that was requested; in another epoch the replacement differs.
        facts: The modalities of all rows.
        seed: Seed of the data set.
        length: Returns the number of tokens of a row.
    """
    codes = facts.arrays["codes"]
    size = len(codes)
    start = derive_seed(seed, index, _STREAM) % size
    waiting: list[int] = []
    limit = length(row)
    for candidate in _same(codes, int(codes[row]), start=start, size=size):
        if candidate == row:
            continue
        waiting.append(candidate)
        if len(waiting) == _MAX_MEASURED:
            yield from _shortest_first(waiting, limit, length)
            waiting = []
    yield from _shortest_first(waiting, limit, length)


def _same(codes: np.ndarray, code: int, *, start: int, size: int) -> Iterator[int]:
    """The rows with a code, from `start` to the end, then from 0 to `start`."""
    for first, last in ((start, size), (0, start)):
        for low in range(first, last, _WINDOW):
            high = min(low + _WINDOW, last)
            yield from (np.flatnonzero(codes[low:high] == code) + low).tolist()


def _shortest_first(rows: list[int], limit: int, length: Callable[[int], int]) -> Iterator[int]:
    longer: list[tuple[int, int]] = []
    for row in rows:
        measured = length(row)
        if measured <= limit:
            yield row
        else:
            longer.append((measured, row))
    yield from (row for _, row in sorted(longer))
