"""Arrays on disk are read back unchanged, are mapped and not copied, and damage is detected."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from umbrella_data.files.mapped_arrays import DamagedArraysError, MappedArrays, write_arrays

ARRAYS = {"a": np.arange(1000), "b": np.array([1, 2, 3], dtype=np.uint32), "none": np.empty(0, dtype=np.int64)}


@pytest.fixture
def path(tmp_path):
    write_arrays(tmp_path / "folder" / "x.index", ARRAYS, facts={"version": 3})
    return tmp_path / "folder" / "x.index"


def test_arrays_are_read_back_unchanged(path):
    arrays = MappedArrays(path)
    assert arrays.facts == {"version": 3}
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert [each.name for each in path.parent.iterdir()] == ["x.index"]


def test_arrays_are_pickled_as_a_path(path):
    content = pickle.dumps(MappedArrays(path))
    assert len(content) < 500
    np.testing.assert_array_equal(pickle.loads(content)["a"], ARRAYS["a"])


def test_arrays_cannot_be_written_to(path):
    with pytest.raises(ValueError, match="read-only"):
        MappedArrays(path)["a"][0] = 5


def test_pickle_is_rejected_if_the_file_was_overwritten(path):
    content = pickle.dumps(MappedArrays(path))
    write_arrays(path, ARRAYS, facts={"version": 4})
    with pytest.raises(DamagedArraysError, match=r"x\.index"):
        pickle.loads(content)


def test_arrays_in_use_do_not_change_if_the_file_is_replaced(path):
    arrays = MappedArrays(path)
    write_arrays(path, {"a": np.zeros(5)}, facts={})
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])


@pytest.mark.parametrize("change", ["empty", "cut", "magic", "header", "longer"])
def test_damaged_file_is_rejected(path, change):
    content = bytearray(path.read_bytes())
    if change in ("magic", "header"):
        content[{"magic": 2, "header": 30}[change]] ^= 1
    new = {"empty": b"", "cut": content[:-64], "longer": bytes(content) + b"x"}.get(change, bytes(content))
    path.write_bytes(new)
    with pytest.raises(DamagedArraysError):
        MappedArrays(path)


def test_old_file_remains_if_writing_fails(path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fdopen", fail)
    with pytest.raises(OSError, match="no space left"):
        write_arrays(path, {}, facts={})
    monkeypatch.undo()
    assert MappedArrays(path).facts == {"version": 3}
    assert len(list(path.parent.iterdir())) == 1
