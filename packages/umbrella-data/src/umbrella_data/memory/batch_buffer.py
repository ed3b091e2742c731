"""Memory for the scans of one batch: what is read straight into it need not be copied again to be stacked.

    read_together(indices, dataset.__getitem__)   # `__getitems__`, which a loader calls for a whole batch: pipelines
                                                  # take places in its memory, one behind the other
    stack(volumes, memory=...)                    # the collator: the memory itself, or a copy where places are missing

In a loader worker the memory is shared from the start, so that a batch is not copied to be handed over; and it is used
again, as `recycled_memory` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch.utils.data import get_worker_info

from umbrella_data.memory.shared_pool import SharedTensor, recycled


class BatchMemory:
    """Places for the stored volumes of one batch, one behind the other.

    Args:
        num_examples: Places for each modality and shape; further volumes find none.
    """

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._num_taken: dict[tuple[str, tuple[int, ...]], int] = {}

    def place(self, modality: str, shape: Sequence[int]) -> torch.Tensor | None:
        """The next place (C, X, Y, Z) float16 for a modality, its values anything; None where all are taken."""
        key = (modality, tuple(shape))
        if key not in self._buffers:
            self._buffers[key] = recycled((self._num_examples, *shape), torch.float16)
        number = self._num_taken.get(key, 0)
        if number == self._num_examples:
            return None
        self._num_taken[key] = number + 1
        return self._buffers[key][number]

    def find(self, modality: str, volumes: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The batch (N, C, X, Y, Z) of volumes that lie in their places, in order; None where they do not."""
        buffer = self._buffers.get((modality, tuple(volumes[0].shape)))
        if buffer is None or len(volumes) > self._num_examples:
            return None
        places = zip(volumes, buffer, strict=False)
        if not all(_is_the_same(each, place) for each, place in places):
            return None
        return buffer.first(len(volumes)) if isinstance(buffer, SharedTensor) else buffer[: len(volumes)]


def _is_the_same(volume: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether a volume is what lies in a place: a view that turns or flips it begins at the same byte."""
    return (
        volume.data_ptr() == place.data_ptr()
        and volume.dtype == place.dtype
        and volume.shape == place.shape
        and volume.stride() == place.stride()
    )


reading: ContextVar[BatchMemory | None] = ContextVar("the batch that is being read", default=None)


def next_place(modality: str, shape: Sequence[int]) -> torch.Tensor:
    """Memory (C, X, Y, Z) float16 for a volume: a place in the batch that is being read, or its own."""
    memory = reading.get()
    place = None if memory is None else memory.place(modality, shape)
    return torch.empty(tuple(shape), dtype=torch.float16) if place is None else place


def stack(volumes: Sequence[torch.Tensor], *, modality: str, memory: BatchMemory | None) -> torch.Tensor:
    """`torch.stack` of volumes of one shape, (N, ...); not copied where they lie in the batch's memory already."""
    found = None if memory is None else memory.find(modality, volumes)
    if found is not None:
        return found
    dtype = volumes[0].dtype
    if get_worker_info() is None or any(each.dtype != dtype for each in volumes):
        return torch.stack(list(volumes))
    return torch.stack(list(volumes), out=recycled((len(volumes), *volumes[0].shape), dtype))
