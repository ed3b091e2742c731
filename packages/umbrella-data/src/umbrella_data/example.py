"""An example: what a data set gives and the collator takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


class ScanPipeline(Protocol):
    """Turns the files of one scan into a tensor; `umbrella_data.transforms.Pipeline` is one."""

    def __call__(
        self, paths: Sequence[Path], /, *, generator: torch.Generator | None, mask: Path | None = None
    ) -> torch.Tensor:
        """A volume (C, X, Y, Z) or series (C, X, Y, Z, T), float32 or float16; without a generator nothing is drawn.

        A mask is given for scans alone that have one.
        """


@dataclass(frozen=True)
class ExampleScan:
    """One scan of an example.

    Attributes:
        modality: Its canonical name.
        volume: (C, X, Y, Z) or (C, X, Y, Z, T), float32; float16 as the cache holds it.
        start: First of its positions in `input_ids`.
        num_tokens: Number of its positions.
    """

    modality: str
    volume: torch.Tensor
    start: int
    num_tokens: int


@dataclass(frozen=True)
class Example:
    """What the collator takes.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64, -100 where nothing is learned.
        scans: The scans in reading order.
        index: The virtual index that it was made from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    scans: tuple[ExampleScan, ...]
    index: int
