"""Benchmarks from preprocessed scans to batches: cache, manifests and sample order.

    python tools/bench_data_cache.py                 # all parts
    python tools/bench_data_cache.py cache samples   # selected parts
    python tools/bench_data_cache.py --json out.json

The variants of a comparison alternate, each in its own process on one thread, with files in the page cache. Figures are
medians of CPU time over the repeats (for the part `loader` wall time, which needs idle cores). Scans are random volumes
in a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench_command import Result, run_parts
from bench_data_order import bench_order
from umbrella_data import ConversationDataset, InterleaveDataset, PaddingCollator, read_manifest
from umbrella_data.cache.store import VolumeCache
from umbrella_data.memory.shared_pool import stack
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_model.tokens import image_token_id
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer

SIZE = (96, 96, 96)
BATCH = 8
# Several batches per turn, as in a loader: a single one would find the processor cache filled by other variants.
BATCHES_PER_TURN = 8
NUM_TOKENS = {"T1": 216}


def main() -> None:
    """Run the selected parts and print a table."""
    run_parts(
        {
            "cache": bench_cache,
            "loader": bench_loader,
            "samples": bench_samples,
            "manifest": bench_manifest,
            "order": bench_order,
        },
        description=__doc__ or "",
        sizes={
            "repeats": (41, "turns per variant"),
            "scans": (64, "scans in the cache"),
            "rows": (1_000_000, "rows of the manifest"),
        },
    )


# ---- the cache against MONAI's ----


def bench_cache(folder: Path, options: argparse.Namespace) -> Result:
    """Random batches of 8 at 96³ from a warm cache, compared with MONAI's two caches."""
    make_scans(folder, options.scans)
    draw = random.Random(0)
    times = time_alternately(
        folder, options.scans, lambda: draw.sample(range(options.scans), BATCH), repeats=options.repeats
    )
    result: Result = {f"{name}, ms per batch": value * 1e3 for name, value in times.items()}
    for name in ("PersistentDataset", "CacheDataset"):
        result[f"{name} / umbrella"] = times[name] / times["umbrella"]
    return result


class _Batches(Dataset[Any]):
    """Batches of one variant."""

    def __init__(self, read: Callable[[list[int]], Any], chosen: list[list[int]]) -> None:
        self._read, self._chosen = read, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Any:
        return self._read(self._chosen[number])


def bench_loader(folder: Path, options: argparse.Namespace) -> Result:
    """Batches from a `DataLoader` with one worker, as in training."""
    paths = make_scans(folder, options.scans)
    draw = random.Random(0)
    chosen = [draw.sample(range(options.scans), BATCH) for _ in range(4 * BATCHES_PER_TURN)]
    loaders = {}
    for name, variant in VARIANTS.items():
        read = warm(variant(folder, paths), options.scans)
        loaders[name] = DataLoader(_Batches(read, chosen), batch_size=None, num_workers=1, persistent_workers=True)
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(options.repeats + 2):
        for name, loader in loaders.items():
            start = time.perf_counter()
            for batch in loader:
                del batch
            if number >= 2:
                seconds[name].append((time.perf_counter() - start) / len(chosen))
    result: Result = {f"{name}, ms per batch": statistics.median(values) * 1e3 for name, values in seconds.items()}
    for name in ("PersistentDataset", "CacheDataset"):
        result[f"{name} / umbrella"] = statistics.median(seconds[name]) / statistics.median(seconds["umbrella"])
    return result


def time_alternately(folder: Path, count: int, draw: Callable[[], list[int]], *, repeats: int) -> dict[str, float]:
    """Median CPU seconds of the variants, which run alternately, each in its own process."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name in VARIANTS:
        pipes[name], child = context.Pipe()
        context.Process(target=serve, args=(name, folder, count, child), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(repeats + 4):
        for name, pipe in pipes.items():
            pipe.send([draw() for _ in range(BATCHES_PER_TURN)])
            measured = pipe.recv()
            if number >= 4:
                seconds[name].append(measured)
    for pipe in pipes.values():
        pipe.send(None)
    return {name: statistics.median(values) for name, values in seconds.items()}


def serve(name: str, folder: Path, count: int, pipe: Any) -> None:
    """Process of one variant: warm the cache, then read the requested batches and return the CPU time."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    read = warm(VARIANTS[name](folder, make_scans(folder, count)), count)
    while (turn := pipe.recv()) is not None:
        start = time.process_time()
        for chosen in turn:
            batch = read(chosen)
            del batch
        pipe.send((time.process_time() - start) / len(turn))


def warm(read: Callable[[list[int]], Any], count: int) -> Callable[[list[int]], Any]:
    """Read every scan once to fill the cache."""
    for first in range(0, count, BATCH):
        read(list(range(first, min(first + BATCH, count))))
    return read


def read_umbrella(folder: Path, paths: list[Path]) -> Callable[[list[int]], Any]:
    """The pipeline with its cache, read as by a dataset and stacked as by the collator."""
    pipeline = make_pipeline(folder)

    def read(chosen: list[int]) -> torch.Tensor:
        return stack([pipeline(paths[i], generator=None) for i in chosen])

    return read


def read_monai(kind: str, folder: Path, paths: list[Path]) -> Callable[[list[int]], Any]:
    """A dataset of MONAI with the usual pipeline."""
    # The type annotations of MONAI are not accurate.
    mt: Any = importlib.import_module("monai.transforms")
    md: Any = importlib.import_module("monai.data")
    steps = mt.Compose(
        [mt.LoadImage(image_only=True), mt.EnsureChannelFirst(), mt.Resize(SIZE), mt.NormalizeIntensity()]
    )
    names = [str(path) for path in paths]
    if kind == "PersistentDataset":
        dataset = md.PersistentDataset(names, transform=steps, cache_dir=str(folder / "monai"))
    else:
        dataset = md.CacheDataset(names, transform=steps, progress=False)
    return lambda chosen: md.list_data_collate([dataset[i] for i in chosen])


VARIANTS: dict[str, Callable[[Path, list[Path]], Callable[[list[int]], Any]]] = {
    "umbrella": read_umbrella,
    "PersistentDataset": partial(read_monai, "PersistentDataset"),
    "CacheDataset": partial(read_monai, "CacheDataset"),
}


def make_scans(folder: Path, count: int) -> list[Path]:
    """Random int16 volumes of 96³ as `.nii.gz`, written if they do not exist."""
    paths = [folder / f"sub-{i:03d}_T1w.nii.gz" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            voxels = np.random.default_rng(i).integers(0, 1000, SIZE).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return paths


def make_pipeline(folder: Path) -> Pipeline:
    """The pipeline for T1 with a cache in the folder."""
    return Pipeline(PipelineConfig(image_size=SIZE), modality="T1", cache=VolumeCache(folder / "cache"))


# ---- samples ----


def make_dataset(folder: Path, options: argparse.Namespace) -> ConversationDataset:
    """A dataset of conversations with cached scans, without augmentation."""
    paths = make_scans(folder, options.scans)
    rows = [make_row(f"{i:03d}", path.name, num_words=8) for i, path in enumerate(paths)]
    manifest = folder / "samples.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_byte_tokenizer()
    pipeline = make_pipeline(folder)
    for path in paths:
        pipeline.warm(path)
    return ConversationDataset(
        read_manifest(manifest),
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        num_image_tokens=NUM_TOKENS,
        pipelines={"T1": pipeline},
        augment=False,
    )


def make_row(name: str, path: str, *, num_words: int) -> Result:
    """A row of a manifest."""
    question = "What is the sex of this person? " + "word " * num_words
    image = {"type": "image", "modality": "T1", "path": path}
    return {
        "id": f"sub-{name}_sex",
        "subject": f"sub-{name}",
        "task": "sex",
        "messages": [
            {"role": "user", "content": [image, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": "female"}]},
        ],
        "answer": {"type": "choice", "options": ["female", "male"], "value": "female"},
    }


def make_collator() -> PaddingCollator:
    """The collator of a T1 run."""
    return PaddingCollator(pad_token_id=0, modality_order=["T1"])


def bench_samples(folder: Path, options: argparse.Namespace) -> Result:
    """Samples per second from a warm cache to a collated batch, on one core."""
    dataset, collate = make_dataset(folder, options), make_collator()
    mixed = InterleaveDataset([dataset])
    times = {"whole": [], "tokens": [], "scan": [], "collate": []}  # type: dict[str, list[float]]
    for number in range(options.repeats + 8):
        indices = range(number * BATCH, (number + 1) * BATCH)
        start = time.process_time()
        examples = [mixed[i] for i in indices]
        middle = time.process_time()
        batch = collate(examples)
        end = time.process_time()
        for i in indices:
            dataset.num_tokens(i)
        tokens = time.process_time() - end
        if number >= 8:
            times["whole"].append((end - start) / BATCH)
            times["collate"].append((end - middle) / BATCH)
            times["tokens"].append(tokens / BATCH)
            times["scan"].append((middle - start - tokens) / BATCH)
        del examples, batch
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "samples per second on one core": 1.0 / medians["whole"],
        "row and tokens, ms per sample": medians["tokens"] * 1e3,
        "scan, ms per sample": medians["scan"] * 1e3,
        "collate, ms per sample": medians["collate"] * 1e3,
    }


# ---- manifests ----


def bench_manifest(folder: Path, options: argparse.Namespace) -> Result:
    """Time and memory to find row offsets, build the full index, and reopen it, for a manifest with many rows."""
    path = folder / "many.jsonl"
    write_rows(path, options.rows)
    path.read_bytes()  # loads the file into the page cache
    code = (
        "import re, sys, time; from pathlib import Path; from umbrella_data.manifest.row_offsets import index_rows\n"
        # getrusage would include memory inherited from the parent process.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "before = peak(); start = time.perf_counter()\n"
        "index = index_rows(Path(sys.argv[1])); print(time.perf_counter() - start, peak() - before)\n"
    )
    seconds, megabytes = map(float, run_python(code, str(path)).split())
    start = time.perf_counter()
    read_manifest(path).index_rows()
    full = time.perf_counter() - start
    reopened = []
    for _ in range(21):
        start = time.perf_counter()
        manifest = read_manifest(path)
        manifest.facts.modalities(len(manifest) // 2)
        reopened.append(time.perf_counter() - start)
    return {
        "rows": options.rows,
        "manifest, MB": path.stat().st_size / 1e6,
        "row offsets, s": seconds,
        "row offsets, peak MB": megabytes,
        "full index, saved, s": full,
        "saved index, MB": path.with_name(f".{path.name}.index").stat().st_size / 1e6,
        "reopened, ms": statistics.median(reopened) * 1e3,
    }


def write_rows(path: Path, count: int) -> None:
    """Write a manifest with many rows."""
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps(make_row(f"{i:07d}", f"sub-{i:07d}_T1w.nii.gz", num_words=i % 60)) + "\n")


def run_python(code: str, *arguments: str) -> str:
    """Standard output of a new interpreter."""
    import subprocess

    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
