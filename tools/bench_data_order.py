"""The part `order` of `bench_data_cache.py`: memory and time to shuffle and batch 10⁸ samples."""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_data import ModalityBatchSampler
from umbrella_data.seeding import Permutation


class _Lengths:
    """A dataset of which only the number of samples, their modalities and lengths are defined."""

    is_epoch_constant = True

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def modality_masks(self, indices: np.ndarray) -> np.ndarray:
        return indices % 3

    def modality_sets(self) -> frozenset[frozenset[str]]:
        return frozenset(frozenset([name]) for name in ("T1", "rsfMRI", "dMRI"))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return 200 + indices * 7919 % 2000


def bench_order(_folder: Path, _options: argparse.Namespace) -> dict[str, Any]:
    """Memory of a shuffled order of 10⁸ samples, and of batches by modality."""
    size = 10**8

    def peak(run: Callable[[], None]) -> float:
        tracemalloc.start()
        run()
        megabytes = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return megabytes

    def shuffle() -> None:
        order = Permutation(size, key=1)
        for start in range(0, 16 * 65_536, 65_536):
            order.block(start, start + 65_536)

    def draw_batches() -> None:
        batches: Iterator[list[int]] = iter(ModalityBatchSampler(_Lengths(size), batch_size=8))
        for _ in range(20_000):
            next(batches)

    order_megabytes, batch_megabytes = peak(shuffle), peak(draw_batches)
    start = time.process_time()
    shuffle()
    return {
        "samples": size,
        "shuffled order, MB": order_megabytes,
        "shuffled order, ns per index": (time.process_time() - start) / (16 * 65_536) * 1e9,
        "batches by modality, MB": batch_megabytes,
    }
