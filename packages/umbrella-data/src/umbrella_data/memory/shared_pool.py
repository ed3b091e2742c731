"""Memory for batches that is used again: to clear a fresh page takes the system longer than to read voxels into it.

A block is free once nothing has on to the batch in it. In a loader worker blocks are shared memory: a batch is handed
to the training process as it is there, and that process notes in the block itself when it has let go of the batch.
Wherever it cannot be told that a batch is gone, its block is never used again.
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
# Blocks in use that it hopes to see free again: those of lost batches never are.
_MAX_IN_USE = 64
# Shared blocks begin with a page for what the other side notes.
_HEADER_BYTES = mmap.PAGESIZE


class _Block:
    """Memory of this process alone, or shared with those that are handed a batch in it.

    Args:
        num_bytes: Its size.
        is_shared: Whether other processes can map it.

    Raises:
        OSError: The system gives no memory that can be shared.
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
        """Of its first byte, in this process."""
        return int(self._memory.ctypes.data)

    @property
    def is_free(self) -> bool:
        """Whether neither this process nor one that was handed a batch has on to it."""
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
        """A handle of the file for another process; the block is not free again before that has released it."""
        from multiprocessing.reduction import DupFd  # not on every system

        assert self.file is not None
        self._num_sent += 1
        return DupFd(self.file)


def _holders(view: np.ndarray, tensor: torch.Tensor) -> tuple[weakref.ref[Any], ...]:
    """What lives as long as the memory is in use: the array, and the storage that torch keeps for all views.

    Where a tensor is sent on, torch puts other memory under its storage and drops the array, while numpy arrays made of
    the tensor stay where they were: they hold the storage.
    """
    return weakref.ref(view), weakref.ref(tensor.untyped_storage())


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
        # A pickle in a file or a string may be read often, or never.
        values: tuple[Any, ...] = self.clone().__reduce_ex__(protocol)
        return values


def _in_block(tensor: torch.Tensor, block: _Block) -> SharedTensor:
    shared: SharedTensor = tensor.as_subclass(SharedTensor)
    shared._block = block
    return shared


def _send(tensor: SharedTensor) -> Any:
    """To another process, as `multiprocessing` sends: a handle of the block, or a copy of what is elsewhere now."""
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
    """A batch in this process; when everything that has on to it is gone, its block is released.

    Args:
        everything: The block's memory, its header too; it stays mapped until then.
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
    """In the process that is handed a tensor: the same memory, released when the last view of it is gone."""
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
        # Each of them keeps `received`, which goes with the last.
        weakref.finalize(holder(), _let_go, received).atexit = False
    return tensor


def _let_go(received: _Received) -> None:
    """Drops its argument."""


def _counter(everything: np.ndarray) -> np.ndarray:
    return everything[:8].view(np.int64)


_blocks: list[_Block] = []
# A block is seen to be free, and only then taken: one thread at a time.
_choosing = threading.Lock()


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a batch, its values anything; in a loader worker shared with the process that it is loaded for."""
    is_shared = get_worker_info() is not None
    if is_shared and not hasattr(os, "memfd_create"):
        return _fresh(shape, dtype)
    try:
        with _choosing:
            block = _choose(prod(shape) * dtype.itemsize, is_shared=is_shared)
            tensor = block.take(shape, dtype)
    except OSError:  # some containers forbid such files
        return _fresh(shape, dtype)
    return _in_block(tensor, block) if is_shared else tensor


def stack(volumes: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` of volumes of one shape, (N, ...), into reused memory."""
    dtype = volumes[0].dtype
    if any(each.dtype != dtype for each in volumes):
        return torch.stack(list(volumes))
    return torch.stack(list(volumes), out=recycled((len(volumes), *volumes[0].shape), dtype))


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Shared memory as torch's own collate function takes it."""
    storage = torch.UntypedStorage._new_shared(prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]


def _choose(num_bytes: int, *, is_shared: bool) -> _Block:
    # A worker has inherited the blocks of the process that it was forked from.
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
    """What is in use now may go on in the child, of which nobody would hear."""
    _receiving.acquire()
    for received in _received:
        received.is_lost = True
    _choosing.acquire()
    _blocks[:] = [block for block in _blocks if not block.is_shared or block.is_free]


def _after_fork() -> None:
    _choosing.release()
    _receiving.release()


if hasattr(os, "register_at_fork"):
    # Both locks are held while it forks, so that a child never starts with one that nobody will release.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
