"""Pool of reusable buffers for batches; zeroing fresh pages costs more than reading voxels into them.

A block is free when no tensor refers to it. In a loader worker, blocks are shared memory: the training process maps the
block of a batch without a copy, and increments a counter in the header of the block when it has released the batch. A
block is never reused if it is unknown whether its batch still exists (for example after a fork).
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info

from umbrella_data.hf_compat import PLAIN_RESULTS

# Free blocks that a process keeps for later batches.
_MAX_SPARE = 6
_MAX_SPARE_BYTES = 1 << 29
# Blocks in use that a process tracks for reuse. Limited, because the blocks of lost batches never become free.
_MAX_IN_USE = 64
# A shared block begins with one page for the counter that the receiver increments.
_HEADER_BYTES = mmap.PAGESIZE


class _Block:
    """Buffer for one batch: private memory of this process, or shared memory.

    Args:
        num_bytes: Size without the header.
        is_shared: Whether other processes can map it.

    Raises:
        OSError: If the system provides no shared memory.
    """

    def __init__(self, num_bytes: int, *, is_shared: bool) -> None:
        self.num_bytes = num_bytes
        self.is_shared = is_shared
        self.owner = os.getpid()
        self.file: int | None = None
        self._num_sent = 0
        self._holders: tuple[weakref.ref[Any], ...] = ()
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
    def address(self) -> int:
        """Address of the first byte in this process."""
        return int(self._memory.ctypes.data)

    @property
    def is_free(self) -> bool:
        """Whether neither this process nor a receiver refers to the block."""
        # In this order: `send` counts a batch before this process releases it.
        is_held_here = any(holder() is not None for holder in self._holders)
        return not is_held_here and self._num_sent == int(self._num_released[0])

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the whole block, which is in use until the tensor and all its views are deleted."""
        view = self._memory[:]
        tensor = torch.from_numpy(view).view(dtype).reshape(tuple(shape))
        self._holders = _holders(view, tensor)
        return tensor

    def send(self) -> Any:
        """A handle of the file for another process; the block is in use until that process has released it."""
        from multiprocessing.reduction import DupFd  # not available on every system

        assert self.file is not None
        self._num_sent += 1
        return DupFd(self.file)


def _holders(view: np.ndarray, tensor: torch.Tensor) -> tuple[weakref.ref[Any], ...]:
    """References to the two objects that keep the memory in use: the numpy array, and the storage of all torch views.

    When a tensor is sent, torch can replace the memory of its storage and drop the array, while numpy arrays created
    from the tensor keep pointing to the old memory; they hold the storage.
    """
    return weakref.ref(view), weakref.ref(tensor.untyped_storage())


class SharedTensor(torch.Tensor):
    """A tensor over a shared block; sent to another process without a copy, received as a plain tensor."""

    # Results of operations are plain tensors, since they are not at the start of a block.
    __torch_function__ = PLAIN_RESULTS
    block: _Block

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A pickle in a file or a string can be loaded any number of times, so it must not refer to the block.
        values: tuple[Any, ...] = self.clone().__reduce_ex__(protocol)
        return values


def _send(tensor: SharedTensor) -> Any:
    """Reduce for `multiprocessing`: a handle of the block, or a copy if the tensor is no longer in its block."""
    block = tensor.block
    is_whole = (
        tensor.data_ptr() == block.address
        and tensor.is_contiguous()
        and tensor.nbytes <= block.num_bytes
        and not tensor.requires_grad
        and os.getpid() == block.owner
    )
    if not is_whole:
        return reduce_tensor(tensor.clone().detach().requires_grad_(tensor.requires_grad))
    return _receive, (block.send(), block.num_bytes, tuple(tensor.shape), tensor.dtype)


ForkingPickler.register(SharedTensor, _send)


class _Received:
    """A batch in the receiving process; its block is released when nothing refers to this object.

    Args:
        everything: Memory of the block with its header.
    """

    def __init__(self, everything: np.ndarray) -> None:
        self._num_released = _counter(everything)
        self._receiver = os.getpid()
        self.is_lost = False

    def __del__(self) -> None:
        if not self.is_lost and os.getpid() == self._receiver:
            self._num_released += 1


_received: weakref.WeakSet[_Received] = weakref.WeakSet()
_receiving = threading.Lock()


def _receive(handle: Any, num_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rebuild a sent tensor in the receiving process, in the same memory, released with its last view."""
    file = handle.detach()
    try:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        everything = np.frombuffer(mmap.mmap(file, _HEADER_BYTES + num_bytes, flags=flags), dtype=np.uint8)
    finally:
        os.close(file)
    view = everything[_HEADER_BYTES : _HEADER_BYTES + prod(shape) * dtype.itemsize]
    tensor = torch.from_numpy(view).view(dtype).reshape(shape)
    received = _Received(everything)
    with _receiving:
        _received.add(received)
    for holder in _holders(view, tensor):
        # Each finalizer refers to `received`, which is deleted with the last of them.
        weakref.finalize(holder(), _release, received).atexit = False
    return tensor


def _release(received: _Received) -> None:
    """Do nothing: calling the finalizer deletes its reference to `received`."""


def _counter(everything: np.ndarray) -> np.ndarray:
    return everything[:8].view(np.int64)


_blocks: list[_Block] = []
# Held from the check that a block is free until the block is in use.
_choosing = threading.Lock()


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor from the pool; in a loader worker a `SharedTensor`, where the system supports it."""
    is_shared = get_worker_info() is not None
    if is_shared and not hasattr(os, "memfd_create"):
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        with _choosing:
            block = _choose(prod(shape) * dtype.itemsize, is_shared=is_shared)
            tensor = block.take(shape, dtype)
    except OSError:  # memfd_create is forbidden in some containers
        return torch.empty(tuple(shape), dtype=dtype)
    if is_shared:
        tensor = tensor.as_subclass(SharedTensor)
        tensor.block = block
    return tensor


def stack(volumes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` of volumes of one shape, (N, ...), into memory of the pool."""
    dtype = volumes[0].dtype
    if any(each.dtype != dtype for each in volumes):
        return torch.stack(list(volumes))
    return torch.stack(list(volumes), out=recycled((len(volumes), *volumes[0].shape), dtype))


def _choose(num_bytes: int, *, is_shared: bool) -> _Block:
    # A forked worker has inherited the blocks of its parent, which it must not use.
    own = [block for block in _blocks if block.owner == os.getpid() and block.is_shared == is_shared]
    free = [block for block in own if block.is_free]
    chosen = next((block for block in free if block.num_bytes == num_bytes), None)
    chosen = chosen or _Block(num_bytes, is_shared=is_shared)
    in_use = [block for block in own if block not in free][-_MAX_IN_USE:]
    spare: list[_Block] = []
    for block in reversed(free):
        if block is not chosen and len(spare) < _MAX_SPARE and _size([*spare, block]) <= _MAX_SPARE_BYTES:
            spare.insert(0, block)
    _blocks[:] = [*spare, *in_use, *([chosen] if num_bytes <= _MAX_SPARE_BYTES else [])]
    return chosen


def _size(blocks: Sequence[_Block]) -> int:
    return sum(block.num_bytes for block in blocks)


def _before_fork() -> None:
    """Never reuse blocks that are in use now: the child may keep their batches, and does not report their release."""
    _receiving.acquire()
    for received in _received:
        received.is_lost = True
    _choosing.acquire()
    _blocks[:] = [block for block in _blocks if not block.is_shared or block.is_free]


def _after_fork() -> None:
    _choosing.release()
    _receiving.release()


if hasattr(os, "register_at_fork"):
    # Hold both locks during a fork, so that the child never starts with a lock held by a thread it does not have.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
