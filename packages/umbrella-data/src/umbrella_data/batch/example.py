"""Examples: output of a data set, input of the collator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


class ScanPipeline(Protocol):
    """Reads the files of one scan into a tensor, as `umbrella_data.pipeline.pipeline.Pipeline` does."""

    def __call__(
        self, paths: Sequence[Path], /, *, generator: torch.Generator | None, mask: Path | None = None
    ) -> torch.Tensor:
        """A volume (C, X, Y, Z) or series (C, X, Y, Z, T), float32 or float16; deterministic if `generator` is None.

        `mask` is passed only for scans that have a mask.
        """


@dataclass(frozen=True)
class ExampleScan:
    """One scan of an example.

    Attributes:
        modality: Canonical name.
        volume: (C, X, Y, Z) or (C, X, Y, Z, T), float32; float16 from the cache.
        start: First of its positions in `input_ids`.
        num_tokens: Number of its positions.
    """

    modality: str
    volume: torch.Tensor
    start: int
    num_tokens: int


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample comes from; as text, how messages name it.

    Attributes:
        manifest: Path of its manifest.
        line: Its line in the manifest.
        subject: Subject as named in the manifest.
    """

    manifest: str
    line: int
    subject: str

    def __str__(self) -> str:
        return f"{self.manifest}, line {self.line}, subject {self.subject}"


@dataclass(frozen=True)
class Example:
    """One encoded conversation with its scans.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64, -100 at positions without loss.
        scans: The scans in reading order.
        index: Virtual index in its data set.
        origin: The row that was read, which differs from the index's own if that has an unusable scan.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    scans: tuple[ExampleScan, ...]
    index: int
    origin: SampleOrigin | None = None
