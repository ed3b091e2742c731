"""Errors keep their parts, also through a pickle, as loader workers send them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from umbrella_data.errors import ManifestError, ScanError, ScanReason, UmbrellaDataError


def test_scan_error_names_path_and_reason_when_printed() -> None:
    error = ScanError("ends early", path=Path("a/b.nii.gz"), reason="gzip_truncated")
    assert str(error) == "a/b.nii.gz: ends early [gzip_truncated]"
    assert error.path == "a/b.nii.gz"
    assert error.reason == "gzip_truncated"
    assert isinstance(error, UmbrellaDataError)


def test_scan_error_keeps_its_parts_when_pickled() -> None:
    error = pickle.loads(pickle.dumps(ScanError("bad", path="x.nii", reason=ScanReason.AFFINE)))
    assert (error.message, error.path, error.reason) == ("bad", "x.nii", ScanReason.AFFINE)


def test_scan_error_refuses_a_reason_that_is_not_a_code() -> None:
    with pytest.raises(ValueError, match="somehow"):
        ScanError("bad", path="x.nii", reason="somehow")


def test_manifest_error_lists_all_problems_when_printed_and_pickled() -> None:
    error = pickle.loads(pickle.dumps(ManifestError(["line 1: a", "line 7: b"], path="m.jsonl")))
    assert error.problems == ["line 1: a", "line 7: b"]
    assert error.path == "m.jsonl"
    assert str(error) == "m.jsonl: 2 problems\n  line 1: a\n  line 7: b"
