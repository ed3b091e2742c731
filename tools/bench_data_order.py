"""The part `order` of `bench_data_cache.py`: what very many samples take to be shuffled and batched."""

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
    """A data set of many samples, of which nothing is known but a length."""

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
    """Memory of a shuffled order of 10⁸ samples, and of batches by modality over it."""
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

    def deal() -> None:
        batches: Iterator[list[int]] = iter(ModalityBatchSampler(_Lengths(size), batch_size=8))
        for _ in range(20_000):
            next(batches)

    order_megabytes, batch_megabytes = peak(shuffle), peak(deal)
    start = time.process_time()
    shuffle()
    return {
        "samples": size,
        "shuffled order, MB": order_megabytes,
        "shuffled order, ns an index": (time.process_time() - start) / (16 * 65_536) * 1e9,
        "batches by modality, MB": batch_megabytes,
    }
