"""The errors of this package: each names the file, the line or subject, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from os import PathLike, fspath
from typing import Any


class ScanReason(StrEnum):
    """Why a scan was refused. The codes are stable: tools may count and compare them."""

    MISSING = "missing"
    NOT_REGULAR_FILE = "not_regular_file"
    UNREADABLE = "unreadable"
    FILE_TYPE = "file_type"
    GZIP_HEADER = "gzip_header"
    GZIP_DATA = "gzip_data"
    GZIP_CRC = "gzip_crc"
    GZIP_LENGTH = "gzip_length"
    GZIP_TRUNCATED = "gzip_truncated"
    GZIP_TRAILING = "gzip_trailing"
    HEADER = "header"
    DIMS = "dims"
    DTYPE = "dtype"
    OFFSET = "offset"
    SCALING = "scaling"
    SPACING = "spacing"
    AFFINE = "affine"
    TRUNCATED = "truncated"
    TRAILING = "trailing"
    TOO_LARGE = "too_large"
    RANK = "rank"
    NON_FINITE = "non_finite"
    CONSTANT = "constant"
    WINDOW = "window"
    SHORT_SERIES = "short_series"
    MAPS = "maps"
    BVAL = "bval"
    BVEC = "bvec"
    NO_BRAIN = "no_brain"
    MASK = "mask"


class UmbrellaDataError(Exception):
    """Base of every error that this package raises on bad data.

    PyTorch makes an error of a loader worker anew from the text of its traceback alone. Such a text gives an error of
    this base, whose message is what the worker's error said, its notes included.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> UmbrellaDataError:
        """An error of `cls`; of the base where the text of a worker's traceback is all that is left of it."""
        if len(args) == 1 and not kwargs and str(args[0]).startswith(f"Caught {cls.__name__} in "):
            # The last mention is the error itself: what it was raised from stands in front.
            said = str(args[0]).rpartition(f"\n{cls.__module__}.{cls.__qualname__}: ")[2]
            return super().__new__(UmbrellaDataError, said.strip())
        return super().__new__(cls, *args)


class ManifestError(UmbrellaDataError):
    """All problems of one manifest at once.

    Args:
        problems: One sentence a problem, each with its line.
        path: The manifest.
    """

    def __init__(self, problems: str | Sequence[str], *, path: str | PathLike[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.path = fspath(path)
        count = f"{len(self.problems)} problem" + ("" if len(self.problems) == 1 else "s")
        super().__init__("\n".join([f"{self.path}: {count}", *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default: loader workers send errors as pickles.
        return _restore_manifest_error, (self.problems, self.path)


class ScanError(UmbrellaDataError):
    """A scan that cannot be used as it is.

    Args:
        message: What is wrong and what would be right.
        path: The file at fault (the bval or bvec file where that one is wrong).
        reason: A stable code of `ScanReason`.
    """

    def __init__(self, message: str, *, path: str | PathLike[str], reason: ScanReason | str) -> None:
        self.message = message
        self.path = fspath(path)
        self.reason = ScanReason(reason)
        super().__init__(f"{self.path}: {message} [{self.reason}]")

    def bare(self) -> ScanError:
        """The same error as it is before it is raised, to be kept: a traceback keeps the arrays of its frames alive."""
        return ScanError(self.message, path=self.path, reason=self.reason)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore_scan_error, (self.message, self.path, str(self.reason))


class CacheError(UmbrellaDataError):
    """The cache's folder cannot be used: it is full, not ours to write, too small, or what stands in it is lost."""


def _restore_manifest_error(problems: list[str], path: str) -> ManifestError:
    return ManifestError(problems, path=path)


def _restore_scan_error(message: str, path: str, reason: str) -> ScanError:
    return ScanError(message, path=path, reason=reason)
