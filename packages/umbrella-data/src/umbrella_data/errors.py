"""The errors of this package: each states where the problem is, what is wrong and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import partial
from os import PathLike, fspath


class ScanReason(StrEnum):
    """Why a scan was rejected; the codes are stable."""

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
    # No longer raised; in lists of bad scans that were written before `extension`.
    HEADER = "header"
    EXTENSION = "extension"
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
    REPETITION_TIME = "repetition_time"
    MAPS = "maps"
    BVAL = "bval"
    BVEC = "bvec"
    NO_BRAIN = "no_brain"
    MASK = "mask"

    @property
    def meaning(self) -> str:
        """What is wrong with the scan."""
        return _MEANINGS[self]


_MEANINGS = {
    ScanReason.MISSING: "there is no such file, or a link whose target is missing (git-annex: `datalad get`)",
    ScanReason.NOT_REGULAR_FILE: "a folder, a pipe, a socket or a device",
    ScanReason.UNREADABLE: "an error of the system, a file that changes while it is read, or half of a pair is missing",
    ScanReason.FILE_TYPE: "no NIfTI file: a pointer of git-annex or Git LFS, a web page, an archive, DICOM, ...",
    ScanReason.GZIP_HEADER: "an empty or uncompressed file whose name ends in .gz, or gzip under another name",
    ScanReason.GZIP_DATA: "the compressed data are damaged",
    ScanReason.GZIP_CRC: "the decompressed data do not have the checksum that the file states",
    ScanReason.GZIP_LENGTH: "the decompressed data do not have the length that the file states",
    ScanReason.GZIP_TRUNCATED: "the compressed data end too early",
    ScanReason.GZIP_TRAILING: "bytes follow the compressed data",
    ScanReason.HEADER: "no longer used; in lists of bad scans of earlier versions, for `extension`",
    ScanReason.EXTENSION: "header extensions whose sizes do not fit between header and voxels",
    ScanReason.DIMS: "impossible numbers of voxels in the header",
    ScanReason.DTYPE: "a datatype that is not supported: complex, RGB or 128-bit numbers",
    ScanReason.OFFSET: "an impossible position of the voxels in the file",
    ScanReason.SCALING: "slope and intercept with which voxels cannot be scaled",
    ScanReason.SPACING: "voxel sizes that no brain scan has; check the affine and its unit",
    ScanReason.AFFINE: "an affine, sform or qform that cannot be used",
    ScanReason.TRUNCATED: "fewer bytes than the header declares, or an empty file",
    ScanReason.TRAILING: "more bytes than the header declares",
    ScanReason.TOO_LARGE: "more voxels than `max_voxels`, or far more than the file can hold",
    ScanReason.RANK: "a series where a volume is needed, or the reverse",
    ScanReason.NON_FINITE: "voxels that are NaN or infinite",
    ScanReason.CONSTANT: "every voxel, or every voxel of a frame or b0 volume, has the same value",
    ScanReason.WINDOW: "frames are requested that the series does not have",
    ScanReason.SHORT_SERIES: "a series that is shorter than the model's window; `short_series: pad` accepts it",
    ScanReason.REPETITION_TIME: "no repetition time in header or sidecar, with `window_seconds`",
    ScanReason.MAPS: "ready maps that do not belong together: another number, order, grid or range of values",
    ScanReason.BVAL: "b-values that are missing, unreadable or do not fit the DWI",
    ScanReason.BVEC: "directions that are missing, unreadable or do not determine a tensor",
    ScanReason.NO_BRAIN: "no brain is found in the mean b0 volume; give a mask",
    ScanReason.MASK: "a brain mask that is missing, unreadable or does not fit its scan",
}


def did_you_mean(word: object, known: Iterable[str], *, num: int = 1, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: "; did you mean 'X'?", or "" if no known word is similar.

    Args:
        word: The unknown word; upper and lower case are not distinguished.
        known: Words that are valid instead.
        num: Most words to suggest.
        cutoff: Least similarity, from 0 to 1.
    """
    words = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(word).lower(), words, n=num, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(words[each]) for each in near)}?" if near else ""


class UmbrellaDataError(Exception):
    """Base of every error that this package raises on bad data.

    PyTorch constructs an error of a loader worker in the training process from its class and the text of its traceback
    only. The classes here parse that text, so that the error has the message, attributes and notes that it had in the
    worker.

    Args:
        message: What is wrong and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_worker_message(message, type(self)) or message)


class ManifestError(UmbrellaDataError):
    """All problems of one manifest at once.

    Args:
        problems: One sentence per problem, each with its line.
        path: The manifest. Only PyTorch leaves it out, with the text of a worker's traceback as `problems`.
    """

    def __init__(self, problems: str | Sequence[str], *, path: str | PathLike[str] | None = None) -> None:
        if path is None:
            parts = _parts(problems, type(self), form=_MANIFEST_ERROR)
            path, problems = parts["path"], parts["problems"].removeprefix("\n  ").split("\n  ")
            _add_notes(self, parts["notes"])
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.path = fspath(path)
        count = f"{len(self.problems)} problem" + ("" if len(self.problems) == 1 else "s")
        super().__init__("\n".join([f"{self.path}: {count}", *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[object, ...]:
        # By default, a pickle has no keyword-only arguments.
        return partial(type(self), path=self.path), (self.problems,), self.__dict__


class ScanError(UmbrellaDataError):
    """A scan that cannot be used as it is.

    Args:
        message: What is wrong and what to do.
        path: The file with the problem (the bval or bvec file if that one is wrong).
        reason: A stable code of `ScanReason`. Only PyTorch leaves out path and reason, with the text of a worker's
            traceback as `message`.
    """

    def __init__(
        self, message: str, *, path: str | PathLike[str] | None = None, reason: ScanReason | str | None = None
    ) -> None:
        if path is None or reason is None:
            parts = _parts(message, type(self), form=_SCAN_ERROR)
            message, path, reason = parts["message"], parts["path"], parts["reason"]
            _add_notes(self, parts["notes"])
        self.message = message
        self.path = fspath(path)
        self.reason = ScanReason(reason)
        super().__init__(f"{self.path}: {message} [{self.reason}]")

    def bare(self) -> ScanError:
        """A copy without traceback, which would keep the arrays of its frames alive."""
        return ScanError(self.message, path=self.path, reason=self.reason)

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), path=self.path, reason=self.reason), (self.message,), self.__dict__


class CacheError(UmbrellaDataError):
    """The folder of the cache or of gzip indexes cannot be used: it is full, read-only or too small, or loses files."""


# Messages of the errors at the end of a traceback, followed by lines of notes. A path ends at its first ": ".
_MANIFEST_ERROR = re.compile(
    r"(?P<path>.*?): \d+ problems?(?P<problems>(?:\n  [^\n]*)+)(?:\n(?P<notes>.*))?", re.DOTALL
)
_SCAN_ERROR = re.compile(
    rf"(?P<path>.*?): (?P<message>.*?) \[(?P<reason>{'|'.join(ScanReason)})\](?:\n(?P<notes>.*))?", re.DOTALL
)


def _worker_message(message: object, error: type[Exception]) -> str | None:
    """The message and notes of an error of a loader worker, if the argument is PyTorch's text about it."""
    text = str(message)
    if not text.startswith(f"Caught {error.__name__} in "):
        return None
    # The class as in a traceback. Its last mention is the error itself: causes precede it.
    module = "" if error.__module__ in ("__main__", "builtins") else f"{error.__module__}."
    _, mention, end = text.rpartition(f"\n{module}{error.__qualname__}: ")
    return end.strip() if mention else None


def _parts(message: object, error: type[Exception], *, form: re.Pattern[str]) -> re.Match[str]:
    parts = form.fullmatch(_worker_message(message, error) or "")
    if parts is None:
        # PyTorch then raises a RuntimeError with the whole text.
        raise TypeError(f"{error.__name__} needs its keyword arguments")
    return parts


def _add_notes(error: Exception, notes: str | None) -> None:
    for note in (notes or "").splitlines():
        error.add_note(note)
