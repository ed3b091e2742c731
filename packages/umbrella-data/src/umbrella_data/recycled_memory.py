"""Memory for batches that is used again: to clear a fresh page takes the system longer than to read voxels into it.

A block is free once nothing holds on to the batch in it. In a loader worker blocks are shared memory: a batch is handed
to the training process as it lies there, and that process notes in the block itself when it has let go of the batch.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from math import prod
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

# Blocks that a process keeps for batches to come, however many are in use.
_MAX_SPARE = 6
_MAX_SPARE_BYTES = 1 << 29
# Shared blocks begin with a page for what the other side notes.
_HEADER_BYTES = mmap.PAGESIZE
_CAN_SHARE = hasattr(os, "memfd_create")


class _Block:
    """Memory of this process alone, or shared with those that are handed a batch in it.

    Args:
        num_bytes: Its size.
        is_shared: Whether other processes can map it.
    """

    def __init__(self, num_bytes: int, *, is_shared: bool) -> None:
        self.num_bytes = num_bytes
        self.is_shared = is_shared
        self.owner = os.getpid()
        self.file: int | None = None
        self._num_sent = 0
        self._view: weakref.ref[np.ndarray] | None = None
        if is_shared:
            self.file = os.memfd_create("umbrella-batch")
            os.ftruncate(self.file, _HEADER_BYTES + num_bytes)
            everything = np.frombuffer(mmap.mmap(self.file, _HEADER_BYTES + num_bytes), dtype=np.uint8)
            self._memory, self._num_released = everything[_HEADER_BYTES:], _counter(everything)
        else:
            self._memory, self._num_released = np.empty(num_bytes, dtype=np.uint8), np.zeros(1, dtype=np.int64)

    def __del__(self) -> None:
        if self.file is not None:
            os.close(self.file)

    @property
    def is_free(self) -> bool:
        """Whether neither this process nor one that was handed a batch holds on to it."""
        is_held_here = self._view is not None and self._view() is not None
        return not is_held_here and self._num_sent == int(self._num_released[0])

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the whole block; it is in use until that tensor, and every view of it, is gone."""
        view = self._memory[:]
        self._view = weakref.ref(view)
        return torch.from_numpy(view).view(dtype).reshape(tuple(shape))

    def send(self) -> Any:
        """A handle of the file for another process; the block is not free again before that has released it."""
        assert self.file is not None
        self._num_sent += 1
        return DupFd(self.file)


class SharedTensor(torch.Tensor):
    """A tensor at the start of a shared block: another process gets it without a copy, as a plain tensor."""

    # Results of operations are plain tensors: they do not lie at the start of a block.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _block: _Block

    def first(self, count: int) -> SharedTensor:
        """The first entries (count, ...), in the same block."""
        return _in_block(self[:count], self._block)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if not self.is_contiguous() or os.getpid() != self._block.owner:
            plain: tuple[Any, ...] = self.clone().__reduce_ex__(protocol)
            return plain
        return _receive, (self._block.send(), self._block.num_bytes, tuple(self.shape), self.dtype)


def _in_block(tensor: torch.Tensor, block: _Block) -> SharedTensor:
    shared: SharedTensor = tensor.as_subclass(SharedTensor)
    shared._block = block
    return shared


def _receive(handle: Any, num_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In the process that is handed a tensor: the same memory, released when the last view of it is gone."""
    file = handle.detach()
    try:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        everything = np.frombuffer(mmap.mmap(file, _HEADER_BYTES + num_bytes, flags=flags), dtype=np.uint8)
    finally:
        os.close(file)
    view = everything[_HEADER_BYTES : _HEADER_BYTES + prod(shape) * dtype.itemsize]
    release = weakref.finalize(view, _release, _counter(everything), os.getpid())
    release.atexit = False
    return torch.from_numpy(view).view(dtype).reshape(shape)


def _release(num_released: np.ndarray, receiver: int) -> None:
    # A process forked off has a copy of the batch, and the batch itself may still be in use.
    if os.getpid() == receiver:
        num_released += 1


def _counter(everything: np.ndarray) -> np.ndarray:
    return everything[:8].view(np.int64)


_spare: list[_Block] = []
# A block is seen to be free, and only then taken: one thread at a time.
_choosing = threading.Lock()


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a batch, its values anything; in a loader worker shared with the process that it is loaded for."""
    is_shared = get_worker_info() is not None
    if is_shared and not _CAN_SHARE:
        storage = torch.UntypedStorage._new_shared(prod(shape) * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    with _choosing:
        block = _choose(prod(shape) * dtype.itemsize, is_shared=is_shared)
        tensor = block.take(shape, dtype)
    return _in_block(tensor, block) if is_shared else tensor


def _choose(num_bytes: int, *, is_shared: bool) -> _Block:
    # A worker has inherited the blocks of the process that it was forked from.
    own = [block for block in _spare if block.owner == os.getpid() and block.is_shared == is_shared]
    fitting = (block for block in own if block.num_bytes == num_bytes and block.is_free)
    chosen = next(fitting, None) or _Block(num_bytes, is_shared=is_shared)
    kept: list[_Block] = []
    for block in [chosen, *(block for block in reversed(own) if block is not chosen)]:
        if len(kept) < _MAX_SPARE and sum(each.num_bytes for each in kept) + block.num_bytes <= _MAX_SPARE_BYTES:
            kept.insert(0, block)
    _spare[:] = kept
    return chosen
