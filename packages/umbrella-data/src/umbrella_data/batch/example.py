"""An example: what a data set gives and the collator takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from umbrella_data.memory.batch_buffer import BatchMemory, reading


class ScanPipeline(Protocol):
    """Turns the files of one scan into a tensor; `umbrella_data.pipeline.pipeline.Pipeline` is one."""

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


class ReadExamples(list[Example]):
    """The examples of one batch, with the memory that their scans may lie in.

    Attributes:
        memory: That memory.
    """

    def __init__(self, examples: Sequence[Example], *, memory: BatchMemory) -> None:
        super().__init__(examples)
        self.memory = memory


def read_together(indices: Sequence[int], read: Callable[[int], Example]) -> ReadExamples:
    """Read the examples of one batch; pipelines find places for their scans with `next_place` meanwhile."""
    memory = BatchMemory(len(indices))
    token = reading.set(memory)
    try:
        return ReadExamples([read(index) for index in indices], memory=memory)
    finally:
        reading.reset(token)
