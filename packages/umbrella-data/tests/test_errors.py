"""Errors keep their attributes when they are pickled or raised in a loader worker."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from umbrella_data.cache.store import _SourceChangedError
from umbrella_data.dataset.bad_scans import TooManyBadScansError
from umbrella_data.errors import CacheError, ManifestError, ScanError, ScanReason, UmbrellaDataError


class _OwnError(ScanError):
    """An error class of a script, whose module is not in tracebacks."""


_OwnError.__module__ = "__main__"
sys.modules["__main__"]._OwnError = _OwnError  # type: ignore[attr-defined]
# The cause has the class of the error itself, and precedes it in the traceback.
CAUSES: dict[type, type[ScanError]] = {_SourceChangedError: _SourceChangedError, _OwnError: _OwnError}


class Failing(Dataset[int]):
    """Raises one error with a cause and notes for every index."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.error.add_note("while reading a T1 scan")
        self.error.add_note("line 3")
        try:
            raise CAUSES.get(type(self.error), ScanError)("another one", path="other.nii", reason="dims")
        except UmbrellaDataError as cause:
            raise self.error from cause


def caught_from_worker(error: Exception) -> Exception:
    with pytest.raises(UmbrellaDataError) as caught:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    found = caught.value.with_traceback(None)
    del caught  # its frames would keep the loader and its worker alive
    assert type(found) is type(error)
    assert "Traceback" not in str(found)
    return found


@pytest.mark.parametrize("kind", [ScanError, _SourceChangedError, _OwnError])
def test_scan_error_keeps_its_attributes_when_raised_in_a_loader_worker(kind: type[ScanError]) -> None:
    error = caught_from_worker(kind("ends: [early]\nsecond line", path="a b/c.nii.gz", reason="gzip_crc"))
    assert isinstance(error, ScanError)
    assert (error.path, error.message, error.reason) == ("a b/c.nii.gz", "ends: [early]\nsecond line", "gzip_crc")
    assert error.__notes__ == ["while reading a T1 scan", "line 3"]
    assert str(error) == "a b/c.nii.gz: ends: [early]\nsecond line [gzip_crc]"


@pytest.mark.parametrize("problems", [["line 1: a"], ["line 1: a", "line 7: b"]])
def test_manifest_error_keeps_its_attributes_when_raised_in_a_loader_worker(problems: list[str]) -> None:
    error = caught_from_worker(ManifestError(problems, path="m.jsonl"))
    assert isinstance(error, ManifestError)
    assert (error.path, error.problems) == ("m.jsonl", problems)
    assert error.__notes__ == ["while reading a T1 scan", "line 3"]


@pytest.mark.parametrize("kind", [UmbrellaDataError, CacheError, TooManyBadScansError])
def test_other_errors_keep_class_and_message_when_raised_in_a_loader_worker(kind: type[UmbrellaDataError]) -> None:
    assert str(caught_from_worker(kind("full"))) == "full\nwhile reading a T1 scan\nline 3"


def test_error_without_its_path_is_rejected() -> None:
    for kind in (ScanError, ManifestError):
        with pytest.raises(TypeError, match="keyword arguments"):
            kind("bad")


def test_scan_error_has_path_and_reason_when_printed() -> None:
    error = ScanError("ends early", path=Path("a/b.nii.gz"), reason="gzip_truncated")
    assert str(error) == "a/b.nii.gz: ends early [gzip_truncated]"
    assert error.path == "a/b.nii.gz"
    assert error.reason == "gzip_truncated"
    assert isinstance(error, UmbrellaDataError)


@pytest.mark.parametrize("kind", [ScanError, _SourceChangedError])
def test_scan_error_keeps_its_class_attributes_and_notes_when_pickled(kind: type[ScanError]) -> None:
    original = kind("bad", path="x.nii", reason=ScanReason.AFFINE)
    original.add_note("while reading a T1 scan")
    error = pickle.loads(pickle.dumps(original))
    assert type(error) is kind
    assert (error.message, error.path, error.reason) == ("bad", "x.nii", ScanReason.AFFINE)
    assert error.__notes__ == ["while reading a T1 scan"]


def test_scan_error_rejects_a_reason_that_is_not_a_code() -> None:
    with pytest.raises(ValueError, match="somehow"):
        ScanError("bad", path="x.nii", reason="somehow")


def test_manifest_error_lists_all_problems_when_printed_and_pickled() -> None:
    error = pickle.loads(pickle.dumps(ManifestError(["line 1: a", "line 7: b"], path="m.jsonl")))
    assert error.problems == ["line 1: a", "line 7: b"]
    assert error.path == "m.jsonl"
    assert str(error) == "m.jsonl: 2 problems\n  line 1: a\n  line 7: b"
