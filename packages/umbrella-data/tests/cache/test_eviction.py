"""A cache with a size limit removes the least recently used entries without disturbing its readers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from umbrella_data.cache import entry as cache_entry
from umbrella_data.cache.eviction import SizeLimit
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import CacheError

FRAMES = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).half().float()
ENTRY_BYTES = 16**3 * 2 + 256


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.nii" for i in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def fetch(cache: VolumeCache, source: Path) -> bool:
    """Read a scan through the cache; returns whether it was computed."""
    made = []
    frames = cache.fetch([source], fingerprint="p", make=lambda: made.append(1) or FRAMES)
    assert torch.equal(frames.read(0, 1), FRAMES)
    return bool(made)


def entries(cache: VolumeCache) -> list[Path]:
    return sorted(cache.directory.glob("volumes/*/*.f16"))


def age(path: Path, seconds: float) -> None:
    """Move a file's last use into the past."""
    status = path.stat()
    os.utime(path, ns=(time.time_ns() - int(seconds * 1e9), status.st_mtime_ns))


def test_cache_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache", max_bytes=6 * ENTRY_BYTES)
    for number, source in enumerate(sources):
        fetch(cache, source)
        for path in entries(cache):
            age(path, 1000 - number)
        # The first scan is used repeatedly.
        fetch(cache, sources[0])
    assert sum(path.stat().st_size for path in entries(cache)) <= 6 * ENTRY_BYTES
    assert len(entries(cache)) >= 4
    assert not fetch(cache, sources[0])
    assert not fetch(cache, sources[-1])
    assert fetch(cache, sources[5])


def test_cache_without_a_limit_keeps_all(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache")
    assert all(fetch(cache, source) for source in sources)
    assert not any(fetch(cache, source) for source in sources)


def test_entry_larger_than_the_limit_is_read(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache", max_bytes=10)
    for source in sources[:3]:
        assert fetch(cache, source)
    assert len(entries(cache)) == 1


def test_entry_removed_between_opening_and_reading_is_restored(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache", max_bytes=10**9)
    frames = cache.fetch([sources[0]], fingerprint="p", make=lambda: FRAMES)
    entries(cache)[0].unlink()
    assert torch.equal(frames.read(0, 1), FRAMES)
    assert len(entries(cache)) == 1


def test_many_readers_and_writers_of_a_small_cache_read_correct_values(tmp_path: Path, sources: list[Path]) -> None:
    failures: list[BaseException] = []

    def work(first: int) -> None:
        cache = VolumeCache(tmp_path / "cache", max_bytes=4 * ENTRY_BYTES)
        try:
            for step in range(60):
                fetch(cache, sources[(first * 7 + step * 3) % len(sources)])
        except BaseException as error:  # noqa: BLE001 - a thread would swallow it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    SizeLimit(tmp_path / "cache" / "volumes", max_bytes=4 * ENTRY_BYTES).enforce()
    assert len(list((tmp_path / "cache").glob("volumes/*/*"))) <= 4


def test_temporary_files_of_a_crashed_writer_are_removed_and_recent_ones_kept(tmp_path: Path) -> None:
    folder = tmp_path / "volumes" / "ab"
    folder.mkdir(parents=True)
    for name, seconds in ((".writing-old", 2 * 86_400), (".writing-new", 10)):
        (folder / name).write_bytes(b"x" * 100)
        os.utime(folder / name, (time.time() - seconds,) * 2)
    SizeLimit(tmp_path / "volumes", max_bytes=50).enforce()
    assert [path.name for path in folder.iterdir()] == [".writing-new"]


def test_recording_a_use_keeps_the_modification_time(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache", max_bytes=10**9)
    fetch(cache, sources[0])
    (entry,) = entries(cache)
    age(entry, 1000)
    before = entry.stat()
    cache_entry._layouts.clear()
    fetch(cache, sources[0])
    after = entry.stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_atime > before.st_atime + 900


def test_holds_only_complete_entries(tmp_path: Path, sources: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache")
    assert not cache.holds([sources[0]], fingerprint="p")
    fetch(cache, sources[0])
    assert cache.holds([sources[0]], fingerprint="p")
    assert not cache.holds([sources[0]], fingerprint="q")
    (entry,) = entries(cache)
    entry.write_bytes(entry.read_bytes()[:-1])
    assert not cache.holds([sources[0]], fingerprint="p")
    entry.unlink()
    entry.mkdir()
    with pytest.raises(CacheError):
        cache.holds([sources[0]], fingerprint="p")


def test_limit_below_one_byte_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes is 0"):
        VolumeCache(tmp_path, max_bytes=0)
