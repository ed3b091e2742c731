"""Memory of a batch is reused after the batch is released in all processes, and not before."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import threading
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from umbrella_data.memory import shared_pool
from umbrella_data.memory.shared_pool import SharedTensor, recycled

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared blocks need memfd_create (Linux)")

SHAPE = (3, 50, 40)
NUM_BATCHES = 24


class Numbers(Dataset):
    """Batches filled with their number, with the file of their block."""

    def __len__(self):
        return NUM_BATCHES

    def __getitem__(self, number):
        tensor = recycled(SHAPE, torch.float32).fill_(number)
        assert isinstance(tensor, SharedTensor)
        return tensor, os.fstat(tensor.block.file).st_ino


def loader():
    return DataLoader(Numbers(), batch_size=None, num_workers=1)


def test_block_of_a_released_batch_is_reused_by_the_worker():
    files = set()
    for number, (tensor, file) in enumerate(loader()):
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, torch.full(SHAPE, float(number)))
        files.add(file)
        del tensor
    # Two are prefetched, one is in use, one is being filled, and some are in transit.
    assert len(files) <= 10  # without reuse 24


def test_blocks_of_batches_in_use_are_not_reused():
    kept = list(loader())
    assert len({file for _, file in kept}) == NUM_BATCHES
    for number, (tensor, _) in enumerate(kept):
        assert torch.equal(tensor, torch.full(SHAPE, float(number)))


def test_view_of_a_part_keeps_the_block():
    batches = iter(loader())
    row = next(batches)[0][1:2, ::7]
    gc.collect()
    others = [tensor.sum().item() for tensor, _ in batches]
    assert len(others) == NUM_BATCHES - 1
    assert not row.any()


def test_values_written_to_a_batch_are_kept():
    batches = iter(loader())
    first = next(batches)[0].fill_(-1)
    assert all(tensor.min() > 0 for tensor, _ in batches)
    assert first.max() == -1


# ---- forked processes ----


def read_late(batch, gate, result):
    gate.wait(30)
    result.put((batch.min().item(), batch.max().item()))
    del batch


def test_forked_process_keeps_its_batch():
    context = multiprocessing.get_context("fork")
    gate, result = context.Event(), context.SimpleQueue()
    batches = iter(loader())
    first = next(batches)[0]
    other = context.Process(target=read_late, args=(first, gate, result))
    other.start()
    del first
    gc.collect()
    assert all(tensor.min() > 0 for tensor, _ in batches)
    gate.set()
    assert result.get() == (0.0, 0.0)
    other.join()
    assert other.exitcode == 0


def test_forked_process_does_not_release_a_batch_of_its_parent():
    context = multiprocessing.get_context("fork")
    gate, result = context.Event(), context.SimpleQueue()
    gate.set()
    batches = iter(loader())
    first = next(batches)[0]
    other = context.Process(target=read_late, args=(first, gate, result))
    other.start()
    other.join()
    assert result.get() == (0.0, 0.0)
    assert all(tensor.min() > 0 for tensor, _ in batches)
    assert not first.any()


def overwrite(result):
    result.put(recycled(SHAPE, torch.float32).fill_(9).max().item())


@pytest.mark.parametrize("is_shared", [False, True])
def test_forked_process_does_not_use_blocks_of_its_parent(monkeypatch, is_shared):
    if is_shared:
        act_as_worker(monkeypatch)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    tensor = recycled(SHAPE, torch.float32).fill_(4)
    block = next(block for block in shared_pool._blocks if block.address == tensor.data_ptr())
    del tensor
    assert block.is_free
    other = context.Process(target=overwrite, args=(result,))
    other.start()
    other.join()
    assert result.get() == 9.0
    assert (block._memory.view("float32") == 4).all()


def test_worker_does_not_reuse_a_batch_that_its_forked_process_holds(monkeypatch):
    act_as_worker(monkeypatch)
    context = multiprocessing.get_context("fork")
    gate, result = context.Event(), context.SimpleQueue()
    tensor = recycled(SHAPE, torch.float32).fill_(4)
    other = context.Process(target=read_late, args=(tensor, gate, result))
    other.start()
    del tensor
    gc.collect()
    recycled(SHAPE, torch.float32).fill_(9)
    gate.set()
    assert result.get() == (4.0, 4.0)
    other.join()


def send(tensor, result):
    result.put(sent(tensor).max().item())


def test_forked_process_sends_a_copy(monkeypatch):
    act_as_worker(monkeypatch)
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    tensor = recycled(SHAPE, torch.float32).fill_(4)
    block = tensor.block
    other = context.Process(target=send, args=(tensor, result))
    other.start()
    other.join()
    assert result.get() == 4.0
    del tensor
    assert block.is_free


def test_fork_waits_until_a_block_is_chosen():
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    with shared_pool._choosing:
        threading.Timer(0.5, shared_pool._choosing.release).start()
        other = context.Process(target=overwrite, args=(result,))
        other.start()
        shared_pool._choosing.acquire()
    other.join(20)
    assert other.exitcode == 0


# ---- operations on a batch ----


def act_as_worker(monkeypatch):
    """Make this process look like a loader worker."""
    monkeypatch.setattr(shared_pool, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(shared_pool, "_blocks", [])


def sent(tensor):
    """The tensor that another process would receive."""
    return pickle.loads(ForkingPickler.dumps(tensor))


def test_results_of_operations_are_plain_tensors(monkeypatch):
    act_as_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(2)
    for result in (tensor + 1, tensor[0], tensor.transpose(0, 1), tensor.clone(), default_collate([tensor, tensor])):
        assert type(result) is torch.Tensor
    assert torch.equal(copy.deepcopy(tensor), torch.full(SHAPE, 2.0))


def test_block_of_a_tensor_sent_twice_is_free_after_two_releases(monkeypatch):
    act_as_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(3)
    address, block = tensor.data_ptr(), tensor.block
    received = [sent(tensor) for _ in range(2)]
    del tensor
    gc.collect()
    assert [each.sum().item() for each in received] == [3.0 * 6000] * 2
    for _ in range(2):
        assert not block.is_free
        received.pop()
    assert block.is_free
    assert recycled(SHAPE, torch.float32).data_ptr() == address


CHANGES = {
    "data": lambda tensor: setattr(tensor, "data", tensor.data * 5),
    "set": lambda tensor: tensor.set_(torch.full(SHAPE, 7.0)),
    "rows": lambda tensor: setattr(tensor, "data", tensor.data[1:]),
    "strided": lambda tensor: tensor.as_strided_((2, 3), (1, 7), 6),
    "transposed": lambda tensor: tensor.transpose_(0, 2),
    "type": lambda tensor: setattr(tensor, "data", tensor.data.double()),
    "gradient": lambda tensor: tensor.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensor_is_sent_with_its_values(monkeypatch, change):
    act_as_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32)
    tensor.copy_(torch.arange(float(tensor.numel())).view(SHAPE))
    CHANGES[change](tensor)
    other = sent(tensor)
    assert torch.equal(other, tensor.clone())
    assert (other.dtype, other.requires_grad) == (tensor.dtype, tensor.requires_grad)


def test_block_is_not_reused_after_a_view_was_sent(monkeypatch):
    act_as_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(1)
    array = tensor.numpy()
    view = sent(tensor[0])  # torch replaces the memory of the whole storage
    others = [recycled(SHAPE, torch.float32).fill_(9) for _ in range(3)]
    assert len(others) == 3
    assert torch.equal(sent(tensor), torch.full(SHAPE, 1.0))
    assert (array == 1).all()
    assert (view == 1).all()


def test_block_of_a_received_batch_that_is_sent_again_is_not_reused():
    batches = iter(loader())
    first = next(batches)[0]
    array = first.numpy()
    first.share_memory_()  # as a queue would: torch replaces its memory
    assert all(tensor.min() > 0 for tensor, _ in batches)
    assert not array.any()
    assert not first.any()


def test_pickle_holds_the_values_and_not_the_block(monkeypatch):
    act_as_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(5)
    block = tensor.block
    text = pickle.dumps(tensor)
    del tensor
    assert block.is_free
    assert torch.equal(pickle.loads(text), torch.full(SHAPE, 5.0))


def num_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


class Several(Numbers):
    """Batches of four modalities."""

    def __getitem__(self, number):
        tensors = [recycled((*SHAPE, size), torch.float16).fill_(number) for size in range(1, 5)]
        return tensors, [os.fstat(tensor.block.file).st_ino for tensor in tensors], num_open_files()


def test_blocks_of_many_modalities_are_reused_and_no_file_stays_open():
    files, num_open = set(), []
    before = num_open_files()
    for number, (tensors, numbers, count) in enumerate(DataLoader(Several(), batch_size=None, num_workers=1)):
        assert all((tensor == number).all() for tensor in tensors)
        files.update(numbers)
        num_open.append(count)
    assert len(files) <= 4 * 10  # without reuse 96
    assert max(num_open[8:]) <= max(num_open[:8]) + 8  # without reuse 64 more
    assert num_open_files() <= before + 10  # without closing 96 more


# ---- blocks that are kept ----


def kept_sizes():
    gc.collect()
    recycled((1,), torch.uint8)  # updates the list of blocks
    return sorted(block.num_bytes for block in shared_pool._blocks if block.num_bytes > 1)


def test_only_the_latest_free_blocks_are_kept(monkeypatch):
    act_as_worker(monkeypatch)
    monkeypatch.setattr(shared_pool, "_MAX_SPARE", 2)
    for size in (1000, 1001, 999, 1000, 998):
        recycled((size,), torch.uint8)
    assert kept_sizes() == [998, 1000]


def test_file_of_a_discarded_block_is_closed(monkeypatch):
    act_as_worker(monkeypatch)
    monkeypatch.setattr(shared_pool, "_MAX_SPARE", 1)
    before = num_open_files()
    for size in range(1, 41):
        recycled((size,), torch.uint8)
    assert num_open_files() <= before + 5


def test_total_size_of_free_blocks_is_limited(monkeypatch):
    act_as_worker(monkeypatch)
    monkeypatch.setattr(shared_pool, "_MAX_SPARE_BYTES", 2500)
    for size in (1000, 1001, 500):
        recycled((size,), torch.uint8)
    assert kept_sizes() == [500, 1001]
    recycled((9000,), torch.uint8)
    assert 9000 not in kept_sizes()


def test_number_of_tracked_blocks_in_use_is_limited(monkeypatch):
    act_as_worker(monkeypatch)
    monkeypatch.setattr(shared_pool, "_MAX_IN_USE", 3)
    held = [recycled((size,), torch.uint8) for size in range(2, 8)]
    assert kept_sizes() == [5, 6, 7]
    del held
    assert kept_sizes() == [5, 6, 7]


@pytest.mark.parametrize("is_available", [True, False], ids=["forbidden", "missing"])
def test_plain_tensor_is_used_without_memfd_create(monkeypatch, is_available):
    def forbid(name):
        raise OSError

    act_as_worker(monkeypatch)
    if is_available:
        monkeypatch.setattr(os, "memfd_create", forbid)
    else:
        monkeypatch.delattr(os, "memfd_create")
    tensor = recycled(SHAPE, torch.float16).fill_(6)
    assert type(tensor) is torch.Tensor
    assert torch.equal(sent(tensor), torch.full(SHAPE, 6.0, dtype=torch.float16))


def test_threads_never_get_the_same_block(monkeypatch):
    shape = (1, 5, 5, 9)
    recycled((2, *shape), torch.float16)  # one free block
    gc.collect()
    both = threading.Barrier(2)

    def ref(view):
        # Each thread waits for the other between choosing a block and taking it; with the lock, it is alone.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        return weakref.ref(view)

    monkeypatch.setattr(shared_pool, "weakref", SimpleNamespace(ref=ref, finalize=weakref.finalize))
    tensors = []
    threads = [
        threading.Thread(target=lambda: tensors.append(recycled((2, *shape), torch.float16)), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tensors) == 2
    assert tensors[0].data_ptr() != tensors[1].data_ptr()
