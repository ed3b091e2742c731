"""The cache: keyed by content, safe with many writers; damage is detected and repaired."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import pickle
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella_data.cache import entry as cache_entry
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import CacheError, ScanError, ScanReason


class Maker:
    """Makes frames and counts its calls."""

    def __init__(self, frames: torch.Tensor) -> None:
        self.frames = frames
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.frames


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"content of a scan")
    return path


@pytest.fixture
def make() -> Maker:
    return Maker(torch.randn(5, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def cache(tmp_path: Path) -> VolumeCache:
    cache_entry._verified.clear()
    return VolumeCache(tmp_path / "cache")


def entries(cache: VolumeCache) -> list[Path]:
    return sorted(cache.directory.glob("volumes/*/*"))


def test_fetch_computes_once(cache: VolumeCache, source: Path, make: Maker) -> None:
    for _ in range(3):
        frames = cache.fetch([source], fingerprint="p", make=make)
        assert frames.num_frames == 5
        torch.testing.assert_close(frames.read(1, 3), make.frames[1:4], rtol=1e-3, atol=1e-3)
    assert make.calls == 1


def test_fetch_depends_on_content_and_pipeline_and_not_on_the_name(
    cache: VolumeCache, source: Path, make: Maker, tmp_path: Path
) -> None:
    cache.fetch([source], fingerprint="p", make=make)
    twin = tmp_path / "twin.nii.gz"
    twin.write_bytes(source.read_bytes())
    cache.fetch([twin], fingerprint="p", make=make)
    assert make.calls == 1
    cache.fetch([source], fingerprint="q", make=make)
    assert make.calls == 2
    source.write_bytes(b"content of a Scan")
    os.utime(source, ns=(5, 5))
    cache.fetch([source], fingerprint="p", make=make)
    assert make.calls == 3
    cache.fetch([source, twin], fingerprint="p", make=make)
    assert make.calls == 4


@pytest.mark.parametrize("scale", [1.0, 1e7, 1e-6])
def test_read_keeps_relative_precision_when_units_are_large_or_small(
    cache: VolumeCache, source: Path, scale: float
) -> None:
    make = Maker(torch.randn(4, 1, 4, 4, 4) * scale + 3 * scale)
    result = cache.fetch([source], fingerprint="p", make=make).read(0, 4)
    torch.testing.assert_close(result, make.frames, rtol=2e-3, atol=2e-3 * scale)


def test_read_keeps_a_volume_in_the_range_of_float16_unscaled(cache: VolumeCache, source: Path) -> None:
    make = Maker(torch.randn(1, 1, 4, 4, 4).half().float())
    assert torch.equal(cache.fetch([source], fingerprint="p", make=make).read(0, 1), make.frames)


def test_read_stays_finite_when_a_volume_exceeds_float16(cache: VolumeCache, source: Path) -> None:
    make = Maker(torch.tensor([-1e5, 0.0, 3e5, 1.0]).reshape(1, 1, 1, 2, 2))
    result = cache.fetch([source], fingerprint="p", make=make).read(0, 1)
    torch.testing.assert_close(result, make.frames, rtol=1e-3, atol=5)


@pytest.mark.parametrize("position", [3, 20, -1], ids=["magic", "header", "voxels"])
def test_read_restores_an_entry_when_a_bit_has_flipped(
    cache: VolumeCache, source: Path, make: Maker, position: int
) -> None:
    cache.fetch([source], fingerprint="p", make=make)
    (entry,) = entries(cache)
    content = bytearray(entry.read_bytes())
    content[position] ^= 4
    entry.write_bytes(bytes(content))
    result = cache.fetch([source], fingerprint="p", make=make).read(0, 5)
    assert make.calls == 2
    torch.testing.assert_close(result, make.frames, rtol=1e-3, atol=1e-3)


def test_fetch_restores_an_entry_when_it_is_truncated(cache: VolumeCache, source: Path, make: Maker) -> None:
    cache.fetch([source], fingerprint="p", make=make)
    (entry,) = entries(cache)
    for size in (0, 10, 100, entry.stat().st_size - 1):
        entry.write_bytes(entry.read_bytes()[:size])
        result = cache.fetch([source], fingerprint="p", make=make).read(0, 5)
        torch.testing.assert_close(result, make.frames, rtol=1e-3, atol=1e-3)
    assert make.calls == 5


def test_fetch_leaves_no_file_when_computing_fails(cache: VolumeCache, source: Path) -> None:
    def fail() -> torch.Tensor:
        raise ScanError("bad", path=source, reason=ScanReason.CONSTANT)

    with pytest.raises(ScanError):
        cache.fetch([source], fingerprint="p", make=fail)
    assert entries(cache) == []


def test_fetch_leaves_no_file_when_writing_fails(
    cache: VolumeCache, source: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    cache.fetch([source], fingerprint="other", make=make)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CacheError, match=r"no space left"):
        cache.fetch([source], fingerprint="p", make=make)
    source.write_bytes(b"a hash that cannot be written either")
    with pytest.raises(CacheError, match="no space left"):
        cache.fetch([source], fingerprint="p", make=make)
    assert len(list(cache.directory.glob("volumes/*/*"))) == 1
    assert list(cache.directory.glob("volumes/*/.writing-*")) == []


@pytest.mark.parametrize("content", [None, b"no entry"], ids=["lost", "damaged"])
def test_cache_error_when_entries_are_lost_repeatedly(
    cache: VolumeCache, source: Path, make: Maker, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = cache.fetch([source], fingerprint="p", make=make)

    def write(path: Path, frames: object) -> int:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        return 1

    monkeypatch.setattr("umbrella_data.cache.store.write_entry", write)
    write(entries(cache)[0], None)
    for read in (lambda: frames.read(0, 5), lambda: cache.fetch([source], fingerprint="p", make=make)):
        with pytest.raises(CacheError, match="lost or damaged each time") as caught:
            read()
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("length", [(1 << 32) - 1, 1 << 25], ids=["longer_than_the_file", "longer_than_any"])
def test_read_takes_little_memory_when_the_length_of_a_header_is_damaged(
    cache: VolumeCache, source: Path, make: Maker, length: int
) -> None:
    cache.fetch([source], fingerprint="p", make=make)
    (entry,) = entries(cache)
    with entry.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", length))
        file.truncate(1 << 26)
    tracemalloc.start()
    try:
        cache.fetch([source], fingerprint="p", make=make)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert make.calls == 2


def test_cache_error_when_its_folder_cannot_be_created(source: Path) -> None:
    with pytest.raises(CacheError, match="cannot be read or written"):
        VolumeCache(source / "cache")


def test_fetch_is_safe_when_many_write_at_once(cache: VolumeCache, source: Path, make: Maker) -> None:
    results: list[torch.Tensor] = []

    def work() -> None:
        results.extend(cache.fetch([source], fingerprint="p", make=make).read(0, 5) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(entries(cache)) == 1


def test_fetch_names_the_file_when_a_source_is_missing(cache: VolumeCache, tmp_path: Path, make: Maker) -> None:
    with pytest.raises(ScanError) as caught:
        cache.fetch([tmp_path / "gone.nii"], fingerprint="p", make=make)
    assert (caught.value.reason, caught.value.path) == (ScanReason.MISSING, str(tmp_path / "gone.nii"))


_TIMES = itertools.count(1)


def replace(path: Path, content: bytes) -> None:
    """Replace a file by another of the same name, as `rsync` and editors do."""
    other = path.with_name("other")
    other.write_bytes(content)
    # Time stamps of a file system may be milliseconds apart, and inode numbers of removed files are used again.
    os.utime(other, ns=(0, next(_TIMES)))
    other.replace(path)


def read_as_frames(path: Path, *, before: Callable[[int], object] = lambda call: None) -> Callable[[], torch.Tensor]:
    """A function that computes frames from the bytes of a file; it first calls `before` with its number of calls."""
    calls: list[int] = []

    def make() -> torch.Tensor:
        calls.append(len(calls))
        before(calls[-1])
        return torch.tensor(list(path.read_bytes())).float().reshape(1, 1, -1, 1, 1)

    return make


def test_fetch_returns_no_stale_frames_when_a_file_changes_before_it_is_read(cache: VolumeCache, source: Path) -> None:
    old, new = b"content of old", b"content of new"
    replace(source, old)
    make = read_as_frames(source, before=lambda call: replace(source, new) if call == 0 else None)
    frames = cache.fetch([source], fingerprint="p", make=make).read(0, 1)
    assert bytes(frames.flatten().byte().tolist()) == new
    # The old content under the same name again, and both under another name, are read correctly.
    for content in (old, new):
        for path in (source, source.with_name("twin")):
            replace(path, content)
            frames = cache.fetch([path], fingerprint="p", make=read_as_frames(path)).read(0, 1)
            assert bytes(frames.flatten().byte().tolist()) == content


def test_fetch_rejects_a_file_when_it_changes_each_time(cache: VolumeCache, source: Path) -> None:
    make = read_as_frames(source, before=lambda call: replace(source, b"content %d" % call))
    with pytest.raises(ScanError, match="changes while it is read") as caught:
        cache.fetch([source], fingerprint="p", make=make)
    assert (caught.value.reason, caught.value.path) == (ScanReason.UNREADABLE, str(source))
    assert entries(cache) == []


def test_entry_is_not_repaired_from_another_file(cache: VolumeCache, source: Path, make: Maker) -> None:
    frames = cache.fetch([source], fingerprint="p", make=make)
    (entry,) = entries(cache)
    entry.unlink()
    replace(source, b"another scan")
    with pytest.raises(ScanError, match="changes while it is read"):
        frames.read(0, 5)
    assert make.calls == 1
    assert entries(cache) == []


def test_hash_is_not_remembered_when_the_file_changes_while_it_is_computed(
    cache: VolumeCache, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        result = digest(file, name)
        if not changed:
            changed.append(file)
            source.write_bytes(b"content that is longer")
        return result

    changed: list[Any] = []
    monkeypatch.setattr(hashlib, "file_digest", slow)
    cache.fetch([source], fingerprint="p", make=read_as_frames(source))
    assert [path.read_text() for path in cache.directory.glob("content/*/*")] == [
        hashlib.sha256(b"content that is longer").hexdigest()
    ]
