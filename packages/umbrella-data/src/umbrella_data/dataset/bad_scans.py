"""Samples that a run skips for bad scans: logged, listed by hash in a file, counted over all processes."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.errors import ScanError, UmbrellaDataError
from umbrella_data.privacy import pseudonyms

logger = logging.getLogger(__name__)

LIST_NAME = "bad_scans.jsonl"


class TooManyBadScansError(UmbrellaDataError):
    """More samples than allowed are unusable."""


@dataclass(frozen=True, kw_only=True)
class BadScan:
    """A sample that is skipped, and why.

    Attributes:
        manifest: Its manifest.
        line: Its line there.
        num_rows: Samples of that manifest.
        subject: Its subject.
        error: What is wrong with the scan.
    """

    manifest: Path
    line: int
    num_rows: int
    subject: str
    error: ScanError


class BadScanList:
    """Counts samples with unusable scans, and stops a run if there are too many.

    Can be pickled for loader workers: all processes of a run append to one file and count what is in it.

    Args:
        max_fraction: Largest fraction of a manifest's samples that may be skipped, 0 to 1.
        folder: Folder of the list and the salt of its hashes; None counts in each process separately.

    Raises:
        ValueError: For a fraction out of range.
    """

    def __init__(self, *, max_fraction: float, folder: str | os.PathLike[str] | None = None) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_fraction is {max_fraction}; it must be from 0 to 1")
        self.max_fraction = max_fraction
        self.folder = None if folder is None else Path(folder)
        self._seen: set[tuple[str, int]] = set()

    def add(self, bad: BadScan) -> None:
        """Add a sample, unless it was added before.

        Raises:
            TooManyBadScansError: Raised from the scan's error, if more than the allowed fraction is bad.
        """
        if (str(bad.manifest), bad.line) in self._seen:
            return
        self._seen.add((str(bad.manifest), bad.line))
        # As text: a handler that keeps its records would keep the voxels in the error's frames alive.
        logger.warning("left out: %s, line %d, subject %s: %s", bad.manifest, bad.line, bad.subject, str(bad.error))
        count = self._count_own(bad) if self.folder is None else self._append(self.folder, bad)
        if count > self.max_fraction * bad.num_rows:
            raise TooManyBadScansError(
                f"{count} of {bad.num_rows} samples of {bad.manifest} are unusable, more than max_fraction "
                f"{self.max_fraction:g} (data.max_bad_fraction in a run's config) allows; the last one: {bad.error}. "
                "`umbrella-data check` lists all"
            ) from bad.error

    def _count_own(self, bad: BadScan) -> int:
        return sum(manifest == str(bad.manifest) for manifest, _ in self._seen)

    def _append(self, folder: Path, bad: BadScan) -> int:
        """Add a line, and count the samples of this manifest that are in the file."""
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
            # One write to a file opened for appending: lines of several processes do not mix.
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
            continue  # cut short by a crash
    return keys
