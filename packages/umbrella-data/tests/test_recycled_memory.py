"""Memory of a batch is used again when the batch is gone everywhere, and not before."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import threading
import weakref
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader, Dataset

from umbrella_data import recycled_memory
from umbrella_data.batch_memory import BatchMemory
from umbrella_data.recycled_memory import SharedTensor, recycled

SHAPE = (3, 50, 40)
NUM_BATCHES = 24


class Numbers(Dataset):
    """Batches full of their number, with the file of the block that they lie in."""

    def __len__(self):
        return NUM_BATCHES

    def __getitem__(self, number):
        tensor = recycled(SHAPE, torch.float32).fill_(number)
        assert isinstance(tensor, SharedTensor)
        return tensor, os.fstat(tensor._block.file).st_ino


def loader():
    return DataLoader(Numbers(), batch_size=None, num_workers=1)


def test_a_batch_that_is_gone_makes_room_in_the_worker():
    files = set()
    for number, (tensor, file) in enumerate(loader()):
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, torch.full(SHAPE, float(number)))
        files.add(file)
        del tensor
    # Two are read ahead, one is in use, one is being made.
    assert len(files) <= 5


def test_batches_that_are_kept_keep_their_memory():
    kept = list(loader())
    assert len({file for _, file in kept}) == NUM_BATCHES
    for number, (tensor, _) in enumerate(kept):
        assert torch.equal(tensor, torch.full(SHAPE, float(number)))


def test_a_view_of_a_part_keeps_the_whole():
    batches = iter(loader())
    row = next(batches)[0][1:2, ::7]
    gc.collect()
    others = [tensor.sum().item() for tensor, _ in batches]
    assert len(others) == NUM_BATCHES - 1
    assert not row.any()


def test_what_is_written_to_a_batch_stays_in_it():
    batches = iter(loader())
    first = next(batches)[0].fill_(-1)
    assert all(tensor.min() > 0 for tensor, _ in batches)
    assert first.max() == -1


def test_a_process_that_was_forked_off_releases_nothing():
    batches = iter(loader())
    first = next(batches)[0]
    other = multiprocessing.get_context("fork").Process(target=first.sum)
    other.start()
    other.join()
    assert other.exitcode == 0
    assert all(tensor.min() > 0 for tensor, _ in batches)
    assert not first.any()


def in_worker(monkeypatch):
    """From here on this process passes for a loader worker."""
    monkeypatch.setattr(recycled_memory, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(recycled_memory, "_spare", [])


def test_what_is_made_of_a_shared_tensor_is_a_plain_one(monkeypatch):
    in_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(2)
    for made in (tensor + 1, tensor[0], tensor.transpose(0, 1), tensor.clone()):
        assert type(made) is torch.Tensor
    assert torch.equal(copy.deepcopy(tensor), torch.full(SHAPE, 2.0))
    first = tensor.first(2)
    assert first.shape == (2, *SHAPE[1:])
    assert first.data_ptr() == tensor.data_ptr()


def test_a_tensor_that_is_sent_twice_is_released_twice(monkeypatch):
    in_worker(monkeypatch)
    tensor = recycled(SHAPE, torch.float32).fill_(3)
    address, block = tensor.data_ptr(), tensor._block
    received = [pickle.loads(pickle.dumps(tensor)) for _ in range(2)]
    del tensor
    gc.collect()
    assert [each.sum().item() for each in received] == [3.0 * 6000] * 2
    for _ in range(2):
        assert not block.is_free
        received.pop()
    assert block.is_free
    assert recycled(SHAPE, torch.float32).data_ptr() == address


def kept_sizes():
    return [block.num_bytes for block in recycled_memory._spare]


def test_few_blocks_are_kept_the_latest(monkeypatch):
    in_worker(monkeypatch)
    monkeypatch.setattr(recycled_memory, "_MAX_SPARE", 2)
    for size in (1000, 1001, 999, 1000, 998):
        recycled((size,), torch.uint8)
    assert kept_sizes() == [1000, 998]


def test_kept_blocks_are_small_together(monkeypatch):
    in_worker(monkeypatch)
    monkeypatch.setattr(recycled_memory, "_MAX_SPARE_BYTES", 2500)
    for size in (1000, 1001, 500):
        recycled((size,), torch.uint8)
    assert kept_sizes() == [1001, 500]
    recycled((9000,), torch.uint8)
    assert 9000 not in kept_sizes()


def test_threads_never_take_the_same_memory(monkeypatch):
    shape = (1, 5, 5, 9)
    BatchMemory(2).place("T1", shape)  # one free block
    gc.collect()
    both = threading.Barrier(2)

    def ref(view):
        # Each waits for the other between choosing a block and saying so; who is let in alone waits in vain.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        return weakref.ref(view)

    monkeypatch.setattr(recycled_memory, "weakref", SimpleNamespace(ref=ref))
    places = []
    threads = [
        threading.Thread(target=lambda: places.append(BatchMemory(2).place("T1", shape)), daemon=True) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 2
    assert places[0].data_ptr() != places[1].data_ptr()
