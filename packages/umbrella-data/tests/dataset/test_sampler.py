"""Batches: each sample exactly once, equal numbers on every rank, none empty, one set of modalities in each."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_data.dataset import sampler as sampler_module
from umbrella_data.dataset.interleave import InterleaveDataset
from umbrella_data.dataset.sampler import ModalityBatchSampler
from umbrella_data.manifest.row_columns import modality_mask

SETS = (("T1",), ("rsfMRI",), ("dMRI",), ("T1", "dMRI"), ())


class Modalities:
    """A fake data set: sample i holds `SETS[codes[i]]` and has `sizes[i]` tokens."""

    is_epoch_constant = True

    def __init__(self, codes, sizes=None):
        self.codes = codes
        self.sizes = sizes

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        return index

    def modalities(self, index):
        return SETS[self.codes[index % len(self.codes)]]

    def modality_masks(self, indices):
        return np.array([modality_mask(self.modalities(index)) for index in indices.tolist()])

    def lengths(self, indices):
        return np.array(self.sizes)[indices % len(self.codes)]

    def modality_sets(self):
        return frozenset(frozenset(SETS[code]) for code in self.codes)


def all_ranks(dataset, *, world_size, epoch=0, **options):
    """The batches of each rank."""
    ranks = []
    for rank in range(world_size):
        sampler = ModalityBatchSampler(dataset, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


def check_epoch(dataset, ranks, *, epoch, batch_size, mode):
    size = len(dataset)
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for of_rank in ranks for batch in of_rank]
    assert all(batches)
    assert sorted(index for batch in batches for index in batch) == list(range(epoch * size, (epoch + 1) * size))
    if mode == "by_modality":
        assert all(len({frozenset(dataset.modalities(index)) for index in batch}) == 1 for batch in batches)
    return batches


CODES = st.lists(st.integers(0, 4), min_size=3, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    codes=CODES,
    batch_size=st.integers(2, 9),
    world_size=st.integers(1, 3),
    mode=st.sampled_from(["by_modality", "mixed"]),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_epoch_delivers_each_sample_once_and_evenly(codes, batch_size, world_size, mode, epoch, shuffle):
    dataset = Modalities(codes)
    options = {"batch_size": batch_size, "mode": mode, "seed": 7, "shuffle": shuffle}
    groups = Counter(codes if mode == "by_modality" else [0] * len(codes))
    least = sum(-(-count // batch_size) for count in groups.values())
    can_split = -(-least // world_size) * world_size <= len(codes)
    if not can_split and len(codes) // world_size * world_size < len(groups):
        with pytest.raises(ValueError, match=f"{world_size} ranks"):
            ModalityBatchSampler(dataset, world_size=world_size, **options)
        return
    ranks = all_ranks(dataset, world_size=world_size, epoch=epoch, **options)
    batches = check_epoch(dataset, ranks, epoch=epoch, batch_size=batch_size, mode=mode)
    assert len(ranks[0]) == (-(-least // world_size) if can_split else least // world_size)
    assert max(map(len, batches)) <= batch_size + (not can_split)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(3, 50), world_size=st.integers(1, 3), epoch=st.integers(0, 2))
def test_batch_size_of_one_when_nothing_can_be_split_makes_few_batches_of_two(size, world_size, epoch):
    dataset = Modalities([0] * size)
    ranks = all_ranks(dataset, world_size=world_size, epoch=epoch, batch_size=1)
    batches = check_epoch(dataset, ranks, epoch=epoch, batch_size=1, mode="by_modality")
    sizes = Counter(map(len, batches))
    assert sum(count for length, count in sizes.items() if length > 1) <= size % world_size
    assert len(ranks[0]) == size // world_size


@settings(max_examples=60, deadline=None)
@given(
    codes=st.lists(st.integers(0, 4), min_size=40, max_size=200),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    mode=st.sampled_from(["by_modality", "mixed"]),
)
def test_epochs_of_many_blocks_have_one_length(codes, batch_size, world_size, mode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "BLOCK_SIZE", 16)
        dataset = Modalities(codes)
        lengths = set()
        for epoch in range(3):
            ranks = all_ranks(dataset, world_size=world_size, epoch=epoch, batch_size=batch_size, mode=mode)
            batches = check_epoch(dataset, ranks, epoch=epoch, batch_size=batch_size, mode=mode)
            lengths.add(len(ranks[0]))
            assert max(map(len, batches)) <= batch_size + (batch_size == 1)
        assert len(lengths) == 1


def test_blocks_keep_batches_within_their_shuffled_indices(monkeypatch):
    monkeypatch.setattr(sampler_module, "BLOCK_SIZE", 20)
    sampler = ModalityBatchSampler(Modalities([0] * 100), batch_size=4, mode="mixed", shuffle=False)
    batches = list(sampler)
    assert [index for batch in batches for index in batch] == list(range(100))
    assert all(batch[0] // 20 == batch[-1] // 20 for batch in batches)


def test_only_the_last_block_ends_with_a_short_batch(monkeypatch):
    monkeypatch.setattr(sampler_module, "BLOCK_SIZE", 20)
    batches = list(ModalityBatchSampler(Modalities([0] * 100), batch_size=3, mode="mixed"))
    assert sorted(map(len, batches)) == [1, *[3] * 33]


def test_epochs_of_a_mixture_whose_modalities_vary_have_one_length():
    # The first part contributes 4 of its 10 samples per epoch, of one or of two modalities.
    mixed = InterleaveDataset([Modalities([0] * 5 + [1] * 5), Modalities([2] * 4)], mixing="equal", stop="first")
    for epoch in range(4):
        ranks = all_ranks(mixed, world_size=2, epoch=epoch, batch_size=4)
        check_epoch(mixed, ranks, epoch=epoch, batch_size=4, mode="by_modality")


def test_global_batches_are_the_same_for_any_number_of_ranks():
    dataset = Modalities([i % 3 for i in range(96)])
    (alone,) = all_ranks(dataset, world_size=1, batch_size=4)
    for world_size in (2, 3, 4):
        ranks = all_ranks(dataset, world_size=world_size, batch_size=4)
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert batches == alone


def test_last_batches_when_not_a_multiple_of_the_ranks_are_split():
    dataset = Modalities([0] * 36)
    (alone,) = all_ranks(dataset, world_size=1, batch_size=4, mode="mixed")
    ranks = all_ranks(dataset, world_size=2, batch_size=4, mode="mixed")
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert batches[:8] == alone[:8]
    assert [*batches[8], *batches[9]] == alone[8]
    assert list(map(len, batches[8:])) == [2, 2]


def test_number_of_batches_by_modality_is_minimal():
    dataset = Modalities([0] * 9 + [1] * 5 + [3] * 2)
    assert len(ModalityBatchSampler(dataset, batch_size=4)) == 3 + 2 + 1
    assert len(ModalityBatchSampler(dataset, batch_size=4, mode="mixed")) == 4


def test_order_differs_by_epoch_and_is_the_same_for_one_seed():
    dataset = Modalities([i % 2 for i in range(40)])

    def order(epoch, seed=0, *, shuffle=True):
        (batches,) = all_ranks(dataset, world_size=1, epoch=epoch, batch_size=4, seed=seed, shuffle=shuffle)
        return [[index % 40 for index in batch] for batch in batches]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    assert set(map(frozenset, order(0))).isdisjoint(map(frozenset, order(1)))
    assert order(0, shuffle=False) == order(1, shuffle=False)
    assert order(0, shuffle=False)[0] == [0, 2, 4, 6]


def test_second_pass_through_a_shuffled_epoch_logs_one_warning(caplog):
    sampler = ModalityBatchSampler(Modalities([0, 1] * 9), batch_size=4)
    first = list(sampler)
    assert not caplog.records
    assert list(sampler) == list(sampler) == first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "epoch 0" in caplog.text
    assert "set_epoch(epoch)" in caplog.text


def test_set_epoch_to_the_same_epoch_logs_the_warning_too(caplog):
    sampler = ModalityBatchSampler(Modalities([0, 1] * 9), batch_size=4)
    for _ in range(2):
        sampler.set_epoch(0)
        list(sampler)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_new_epoch_and_unshuffled_pass_log_no_warning(caplog):
    shuffled = ModalityBatchSampler(Modalities([0, 1] * 9), batch_size=4)
    next(iter(shuffled))  # one batch is not a whole pass
    for epoch in (0, 1, 2):
        shuffled.set_epoch(epoch)
        list(shuffled)
    in_order = ModalityBatchSampler(Modalities([0, 1] * 9), batch_size=4, shuffle=False)
    assert list(in_order) == list(in_order)
    assert not caplog.records


def test_batches_by_modality_are_interleaved():
    (batches,) = all_ranks(Modalities([0] * 60 + [1] * 60), world_size=1, batch_size=4)
    kinds = [batch[0] >= 60 for batch in batches]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 6


def test_set_of_modalities_ignores_their_number_and_order():
    class Pairs(Modalities):
        def modalities(self, index):
            return [("T1", "dMRI"), ("dMRI", "T1", "T1")][index % 2]

    assert len(ModalityBatchSampler(Pairs([0] * 8), batch_size=8)) == 1


@pytest.mark.parametrize("mixing", ["equal", [1.0, 2.5]])
@pytest.mark.parametrize("stop", ["all", "first"])
def test_epochs_of_a_mixture_that_is_not_whole_have_one_length(mixing, stop):
    parts = [Modalities([0, 1, 0, 2, 1, 0, 1]), Modalities([2] * 5)]
    mixed = InterleaveDataset(parts, mixing=mixing, stop=stop, seed=2)
    assert {
        len(ranks[0])
        for epoch in range(4)
        if (ranks := all_ranks(mixed, world_size=2, epoch=epoch, batch_size=3))
        and check_epoch(mixed, ranks, epoch=epoch, batch_size=3, mode="by_modality")
    } == {len(ModalityBatchSampler(mixed, batch_size=3, world_size=2))}


def test_fewer_samples_than_ranks_are_rejected():
    with pytest.raises(ValueError, match=r"2 samples .*world_size 3"):
        ModalityBatchSampler(Modalities([0, 1]), batch_size=4, world_size=3)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "mode": "x"}, {"batch_size": 2, "rank": 1}])
def test_arguments_out_of_range_are_rejected(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        ModalityBatchSampler(Modalities([0, 1]), **options)
