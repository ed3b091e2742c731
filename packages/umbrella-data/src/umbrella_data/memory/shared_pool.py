"""Pool of reusable buffers for batches; zeroing fresh pages costs more than reading voxels into them.

A block is free once nothing refers to its batch. In a loader worker blocks are shared memory: a batch is sent to the
training process without a copy, and that process records in the block when it has released the batch. A block whose
release cannot be observed is never reused.
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

# Free blocks that a process keeps for batches to come.
_MAX_SPARE = 6
_MAX_SPARE_BYTES = 1 << 29
# Blocks in use that are tracked; those of lost batches are never released.
_MAX_IN_USE = 64
# Shared blocks start with a page for the counter of the receiving process.
_HEADER_BYTES = mmap.PAGESIZE


class _Block:
    """A block of memory, private or shared with processes that receive a batch in it.

    Args:
        num_bytes: Its size.
        is_shared: Whether other processes can map it.

    Raises:
        OSError: Shared memory is not available.
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
        """Address of its first byte in this process."""
        return int(self._memory.ctypes.data)

    @property
    def is_free(self) -> bool:
        """Whether no process refers to a batch in it."""
        # In this order: a batch that is being sent is counted before it is released.
        is_held_here = any(holder() is not None for holder in self._holders)
        return not is_held_here and self._num_sent == int(self._num_released[0])

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the whole block; it is in use until that tensor, and every view of it, is gone."""
        view = self._memory[:]
        tensor = torch.from_numpy(view).view(dtype).reshape(tuple(shape))
        self._holders = _holders(view, tensor)
        return tensor

    def send(self) -> Any:
        """A file handle for another process; the block is in use until that process releases it."""
        from multiprocessing.reduction import DupFd  # not on every system

        assert self.file is not None
        self._num_sent += 1
        return DupFd(self.file)


def _holders(view: np.ndarray, tensor: torch.Tensor) -> tuple[weakref.ref[Any], ...]:
    """Objects that live as long as the memory is in use: the array, and the storage of all views.

    When a tensor is sent on, torch moves its storage to other memory and drops the array, while numpy arrays of the
    tensor keep the old memory through the storage.
    """
    return weakref.ref(view), weakref.ref(tensor.untyped_storage())


class SharedTensor(torch.Tensor):
    """A tensor at the start of a shared block: another process gets it without a copy, as a plain tensor."""

    # Results of operations are plain tensors, which are not at the start of a block.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _block: _Block

    def first(self, count: int) -> SharedTensor:
        """The first entries (count, ...), in the same block."""
        return _in_block(self[:count], self._block)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A pickle in a file may be loaded any number of times.
        values: tuple[Any, ...] = self.clone().__reduce_ex__(protocol)
        return values


def _in_block(tensor: torch.Tensor, block: _Block) -> SharedTensor:
    shared: SharedTensor = tensor.as_subclass(SharedTensor)
    shared._block = block
    return shared


def _send(tensor: SharedTensor) -> Any:
    """Pickle for `multiprocessing`: a handle of the block, or a copy if the tensor is not the whole block."""
    block = tensor._block
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
    """A received batch; its block is released when nothing refers to it.

    Args:
        everything: The block's memory with its header; mapped until then.
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
    """In the receiving process: a tensor in the same memory, released with its last view."""
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
        # Each of them keeps `received` alive.
        weakref.finalize(holder(), _release, received).atexit = False
    return tensor


def _release(received: _Received) -> None:
    """Drops its argument."""


def _counter(everything: np.ndarray) -> np.ndarray:
    return everything[:8].view(np.int64)


_blocks: list[_Block] = []
# Choosing and taking a block must not be interleaved between threads.
_choosing = threading.Lock()


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for a batch; in a loader worker, shared with the training process."""
    is_shared = get_worker_info() is not None
    if is_shared and not hasattr(os, "memfd_create"):
        return _fresh(shape, dtype)
    try:
        with _choosing:
            block = _choose(prod(shape) * dtype.itemsize, is_shared=is_shared)
            tensor = block.take(shape, dtype)
    except OSError:  # not permitted in some containers
        return _fresh(shape, dtype)
    return _in_block(tensor, block) if is_shared else tensor


def stack(volumes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` of volumes of one shape, (N, ...), into reused memory."""
    dtype = volumes[0].dtype
    if any(each.dtype != dtype for each in volumes):
        return torch.stack(list(volumes))
    return torch.stack(list(volumes), out=recycled((len(volumes), *volumes[0].shape), dtype))


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Shared memory as allocated by torch's own collate function."""
    storage = torch.UntypedStorage._new_shared(prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]


def _choose(num_bytes: int, *, is_shared: bool) -> _Block:
    # A forked worker has inherited blocks of its parent.
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
    """Blocks in use may stay in use in a child, which cannot be observed."""
    _receiving.acquire()
    for received in _received:
        received.is_lost = True
    _choosing.acquire()
    _blocks[:] = [block for block in _blocks if not block.is_shared or block.is_free]


def _after_fork() -> None:
    _choosing.release()
    _receiving.release()


if hasattr(os, "register_at_fork"):
    # Both locks are held during the fork, so that a child never starts with a lock held by another thread.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
