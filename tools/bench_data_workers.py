"""Benchmarks of loader workers: samples per second, and memory of each worker.

    python tools/bench_data_workers.py                 # all parts
    python tools/bench_data_workers.py windows         # windows of a long 4-D series: briefly needs 2 GB
    python tools/bench_data_workers.py stacking        # the pool of shared memory, fresh memory, and a thread
    python tools/bench_data_workers.py --json out.json

Memory is that of a `DataLoader` worker, forked as in training: the peak of its unique memory (USS), and the peak growth
of its resident memory since the fork (RSS, including pages of libraries).
"""

from __future__ import annotations

import argparse
import gzip
import multiprocessing
import queue
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bench_command import Result, run_parts
from bench_data import head, image_of
from bench_data_cache import BATCH, make_collator, make_dataset, write_rows
from umbrella_data.batch import collator
from umbrella_data.batch.example import Example
from umbrella_data.manifest.manifest import Manifest, read_manifest
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.scan.volume import load_volume
from umbrella_data.seeding import Permutation

SHAPE = (91, 109, 91)
WINDOW = 20


def main() -> None:
    """Run the selected parts and print their figures."""
    run_parts(
        {"windows": bench_windows, "samples": bench_samples, "stacking": bench_stacking, "rows": bench_rows},
        description=__doc__ or "",
        sizes={
            "frames": (1200, "frames of the series"),
            "windows": (8, "windows read by the worker"),
            "scans": (64, "scans in the cache"),
            "samples": (20_000, "samples through the loader"),
            "rounds": (15, "rounds of 512 samples per variant"),
            "rows": (1_000_000, "rows of the manifest"),
        },
    )


# ---- windows of a long series ----


def bench_windows(folder: Path, options: argparse.Namespace) -> Result:
    """Memory of a worker that reads windows of 20 frames from a series of 91x109x91 voxels."""
    path, index_folder = folder / "long.nii.gz", folder / "index"
    write_long_series(path, num_frames=options.frames)
    config = PipelineConfig(image_size=(96, 96, 96, WINDOW))
    result: Result = {}
    for name, index in (("streamed", None), ("saved index", index_folder)):
        pipeline = Pipeline(config, modality="rsfMRI", index_folder=index)
        readers: dict[str, Callable[[int], torch.Tensor]] = {
            "unprocessed": lambda first, index=index: (
                load_volume(  # type: ignore[misc]
                    path, modality="rsfMRI", window=(first, WINDOW), index_folder=index
                ).data
            ),
            "preprocessed to 96³": lambda first, pipeline=pipeline: pipeline(  # type: ignore[misc]
                path, generator=torch.Generator().manual_seed(first)
            ),
        }
        for kind, read in readers.items():
            memory = watch_worker(read, range(0, options.frames - WINDOW, options.frames // options.windows))
            result[f"{name}, {kind} windows: USS, MB"] = memory.private
            result[f"{name}, {kind} windows: growth of RSS since the fork, MB"] = memory.added
    return result


@dataclass
class WorkerMemory:
    """Peak memory of one worker in MB: unique memory, and growth of resident memory since the fork."""

    private: float = 0.0
    added: float = 0.0


class _Windows(Dataset[torch.Tensor]):
    """Windows, indexed by their first frame."""

    def __init__(self, read: Callable[[int], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, first: int) -> torch.Tensor:
        return self._read(first)


def watch_worker(read: Callable[[int], torch.Tensor], firsts: Sequence[int]) -> WorkerMemory:
    """Peak memory of a loader worker that reads windows in batches of one."""
    context = multiprocessing.get_context("fork")
    at_fork = context.Value("d", 0.0)

    def record_start(_worker: int) -> None:
        at_fork.value = status_megabytes("self", "VmRSS")

    loader = DataLoader(
        _Windows(read),
        sampler=list(firsts),
        batch_size=1,
        num_workers=1,
        worker_init_fn=record_start,
        multiprocessing_context=context,
    )
    memory = WorkerMemory()
    iterator = iter(loader)
    (worker,) = iterator._workers  # type: ignore[attr-defined]
    with watched(worker.pid, memory):
        for batch in iterator:
            assert batch.shape[-1] == WINDOW
            del batch
            # The kernel records the peak, which is only available while the worker is alive.
            memory.added = max(memory.added, peak_megabytes(worker.pid) - at_fork.value)
    return memory


@contextmanager
def watched(pid: int, memory: WorkerMemory) -> Iterator[None]:
    """Sample the unique memory of a process every 5 ms."""
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            memory.private = max(memory.private, own_megabytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def write_long_series(path: Path, *, num_frames: int) -> None:
    """Write a series of 91x109x91 voxels, with repeated gzip members of 20 frames so that it takes seconds."""
    small = head(128, seed=3)[:91, :109, :91]
    rng = np.random.default_rng(4)
    image = image_of(np.zeros((2, 2, 2, 2), dtype=np.int16))
    header = image.header.copy()
    header.set_data_shape((*SHAPE, num_frames))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    block = np.stack([small + rng.integers(0, 9, SHAPE, dtype=np.int16) for _ in range(20)], axis=-1)
    member = gzip.compress(block.tobytes(order="F"), 1)
    with path.open("wb") as file:
        file.write(gzip.compress(header.binaryblock + b"\0\0\0\0"))
        for _ in range(num_frames // 20):
            file.write(member)


# ---- samples ----


def bench_samples(folder: Path, options: argparse.Namespace) -> Result:
    """Samples per second with loader workers, and growth of their memory over many samples."""
    dataset, collate = make_dataset(folder, options), make_collator()
    result: Result = {}
    for num_workers in (1, 2, 4):
        num_batches = options.samples // BATCH
        batches = [[(n * BATCH + i) % len(dataset) for i in range(BATCH)] for n in range(num_batches)]
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
        iterator = iter(loader)
        first, last = num_batches // 5, num_batches - 4 * num_workers
        marks: dict[int, float] = {}
        readings: dict[int, list[list[float]]] = {first: [], last: []}
        for number, _ in enumerate(iterator):
            workers = [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined]
            marks[number] = time.perf_counter()
            for mark, found in readings.items():
                # The minimum of several readings, since a worker holds a batch during some of them.
                if mark - 20 <= number < mark:
                    found.append([own_megabytes(pid) for pid in workers])
        before, after = ([min(of_worker) for of_worker in zip(*found, strict=True)] for found in readings.values())
        rate = (last - 20 - first) * BATCH / (marks[last - 20] - marks[first])
        name = f"{num_workers} workers"
        result[f"{name}: samples per second"] = rate
        result[f"{name}: USS of the largest, MB"] = max(after)
        result[f"{name}: most growth over the last 80 % of {options.samples:,}, MB"] = max(
            late - early for early, late in zip(before, after, strict=True)
        )
    return result


class _PlainCollator:
    """The collator without the pool: in a worker, torch stacks into fresh shared memory, as its `default_collate`."""

    def __init__(self) -> None:
        self._collate = make_collator()

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        with mock.patch.object(collator, "stack", stack_fresh):
            return self._collate(examples)


def stack_fresh(volumes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` into fresh memory, shared in a worker."""
    if get_worker_info() is None:
        return torch.stack(list(volumes))
    storage = torch.UntypedStorage._new_shared(sum(volume.nbytes for volume in volumes))
    out = torch.empty(0, dtype=volumes[0].dtype).set_(storage, 0, (len(volumes), *volumes[0].shape))  # type: ignore[call-overload]
    return torch.stack(list(volumes), out=out)


def prefetched(read: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    """The same batches, read by a thread that keeps two ready."""

    def run() -> Iterator[Any]:
        ready: queue.Queue[Any] = queue.Queue(2)

        def fill() -> None:
            for batch in read():
                ready.put(batch)
            ready.put(None)

        threading.Thread(target=fill, daemon=True).start()
        while (batch := ready.get()) is not None:
            yield batch

    return run


def bench_stacking(folder: Path, options: argparse.Namespace) -> Result:
    """Samples per second with and without the pool, in process, from a thread and from workers, in turns."""
    dataset = make_dataset(folder, options)
    batches = [[(n * BATCH + i) % len(dataset) for i in range(BATCH)] for n in range(512 // BATCH)]
    loaders: dict[str, Callable[[], Iterator[Any]]] = {}
    for name, collate in (("pool", make_collator()), ("plain", _PlainCollator())):
        for num_workers in (0, 1, 2):
            loader = DataLoader(
                dataset,
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )
            loaders[f"{num_workers} workers, {name}"] = loader.__iter__
        loaders[f"thread, {name}"] = prefetched(loaders[f"0 workers, {name}"])
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(options.rounds + 1):
        for name, read in loaders.items():
            start = time.perf_counter()
            for batch in read():
                del batch
            if number > 0:
                rates[name].append(512 / (time.perf_counter() - start))
    result: Result = {}
    for name, values in rates.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[f"{name}: samples per second, median"] = middle
        result[f"{name}: samples per second, quartiles"] = f"{low:,.0f} to {high:,.0f}"
    return result


# ---- rows of a large manifest ----


class _Rows(Dataset[int]):
    """Rows of a manifest, parsed as training parses them."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __len__(self) -> int:
        return len(self._manifest)

    def __getitem__(self, row: int) -> int:
        return len(self._manifest[row].id) + len(self._manifest.modalities(row))


def bench_rows(folder: Path, options: argparse.Namespace) -> Result:
    """Memory of 8 workers that read random rows of a large manifest through its saved index."""
    path = folder / "many.jsonl"
    write_rows(path, options.rows)
    read_manifest(path).index_rows()
    manifest = read_manifest(path)
    order = Permutation(len(manifest), key=1)
    num_read = min(options.rows, 400_000)
    sampler = [order(position) for position in range(num_read)]
    loader = DataLoader(_Rows(manifest), sampler=sampler, batch_size=100, num_workers=8)
    iterator = iter(loader)
    early: list[float] = []
    late: list[float] = []
    for number, _ in enumerate(iterator, start=1):
        if number * 100 in (num_read // 5, num_read * 19 // 20):
            pids = [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined]
            (early if not early else late).extend(map(own_megabytes, pids))
    growth = [after - before for before, after in zip(early, late, strict=True)]
    return {
        "rows": options.rows,
        "rows read": num_read,
        "8 workers: USS of the largest, MB": max(late),
        "8 workers: most growth over the last 75 %, MB": max(growth),
    }


# ---- memory of a process ----


def own_megabytes(pid: int) -> float:
    """Unique memory of a process (USS); 0 after it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_megabytes(pid: int) -> float:
    """Peak resident memory of a process; 0 after it has ended."""
    try:
        return status_megabytes(str(pid), "VmHWM")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def status_megabytes(pid: str, field: str) -> float:
    """A field of `/proc/PID/status` in MB; 0 if the process has released its memory."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
