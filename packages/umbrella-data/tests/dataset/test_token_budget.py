"""Batches by length and by token budget: none over the budget, little padding, equally many for all ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_data.dataset import sampler as sampler_module
from umbrella_data.dataset.batch_plan import BatchRule, cut_block
from umbrella_data.dataset.interleave import InterleaveDataset
from umbrella_data.dataset.sampler import ModalityBatchSampler


class Sized:
    """A fake data set: sample i belongs to set of modalities `groups[i]` and has `sizes[i]` tokens."""

    is_epoch_constant = True

    def __init__(self, sizes, groups=None):
        self.sizes = np.array(sizes)
        self.groups = np.zeros_like(self.sizes) if groups is None else np.array(groups)

    def __len__(self):
        return len(self.sizes)

    def modality_masks(self, indices):
        return self.groups[indices % len(self)]

    def lengths(self, indices):
        return self.sizes[indices % len(self)]

    def modality_sets(self):
        return frozenset(frozenset([str(group)]) for group in self.groups)


def batches_of(dataset, *, world_size=1, epoch=0, **options):
    """The batches of all ranks, as lists of positions in the data set."""
    ranks = []
    for rank in range(world_size):
        sampler = ModalityBatchSampler(dataset, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        ranks.append([[index - epoch * len(dataset) for index in batch] for batch in sampler])
        assert len(ranks[-1]) == len(sampler)
    assert len({len(batches) for batches in ranks}) == 1
    return [batch for step in zip(*ranks, strict=True) for batch in step]


def padded(dataset, batch):
    """Positions of a batch, padding included."""
    return int(dataset.sizes[batch].max()) * len(batch)


SIZES = st.lists(st.integers(1, 60), min_size=4, max_size=80)


@settings(max_examples=150, deadline=None)
@given(
    sizes=SIZES,
    data=st.data(),
    world_size=st.integers(1, 3),
    mode=st.sampled_from(["by_modality", "mixed"]),
    limit=st.sampled_from([None, 3]),
    shuffle=st.booleans(),
    packs=st.booleans(),
)
def test_no_batch_exceeds_the_budget_and_each_sample_comes_once(sizes, data, world_size, mode, limit, shuffle, packs):
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    dataset = Sized(sizes, groups)
    options = {"max_tokens": 180, "batch_size": limit, "mode": mode, "seed": 3, "shuffle": shuffle, "padded": not packs}
    counts = set()
    for epoch in range(3):
        batches = batches_of(dataset, world_size=world_size, epoch=epoch, **options)
        assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
        assert all(batches)
        assert all((dataset.sizes[batch].sum() if packs else padded(dataset, batch)) <= 180 for batch in batches)
        assert limit is None or max(map(len, batches)) <= limit
        if mode == "by_modality":
            assert all(len(set(dataset.groups[batch])) == 1 for batch in batches)
        counts.add(len(batches))
    assert len(counts) == 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=60, max_size=200),
    world_size=st.integers(1, 3),
    num_epochs=st.integers(1, 4),
)
def test_epochs_of_many_blocks_have_the_same_number_of_batches(sizes, world_size, num_epochs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "BLOCK_SIZE", 20)
        dataset = Sized(sizes)
        options = {"max_tokens": 120, "batch_size": None, "num_epochs": num_epochs, "world_size": world_size}
        counts = set()
        for epoch in range(num_epochs):
            batches = batches_of(dataset, epoch=epoch, **options)
            assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
            assert all(padded(dataset, batch) <= 120 for batch in batches)
            counts.add(len(batches))
        assert len(counts) == 1


def test_epochs_that_were_not_planned_fit_by_a_margin_or_raise(monkeypatch):
    monkeypatch.setattr(sampler_module, "BLOCK_SIZE", 500)
    dataset = Sized(np.random.default_rng(0).integers(10, 60, size=2000))
    options = {"max_tokens": 400, "batch_size": None}
    assert len({len(batches_of(dataset, epoch=epoch, **options)) for epoch in range(6)}) == 1
    monkeypatch.setattr(sampler_module, "BLOCK_SIZE", 4)
    few = Sized([100] * 20 + [1] * 20)

    def plan_one_epoch_of_twenty():
        for epoch in range(20):
            batches_of(few, epoch=epoch, max_tokens=100, batch_size=None, num_epochs=1)

    with pytest.raises(ValueError, match="num_epochs"):
        plan_one_epoch_of_twenty()


def test_batches_by_length_hold_similar_lengths_and_little_padding():
    dataset = Sized(np.random.default_rng(0).integers(20, 2000, size=800))
    useful = {}
    for by_length in (False, True):
        batches = batches_of(dataset, batch_size=8, mode="mixed", by_length=by_length)
        assert {len(batch) for batch in batches} == {8}
        useful[by_length] = dataset.sizes.sum() / sum(padded(dataset, batch) for batch in batches)
    assert useful[False] < 0.65
    assert useful[True] > 0.97


def test_batches_by_length_come_in_random_order_and_ties_are_shuffled():
    dataset = Sized([10] * 40 + [20] * 40)
    first, second = (batches_of(dataset, batch_size=4, mode="mixed", by_length=True, epoch=epoch) for epoch in (0, 1))
    assert set(map(frozenset, first)).isdisjoint(map(frozenset, second))
    longest = [int(dataset.sizes[batch].max()) for batch in first]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_budget_of_packed_batches_counts_only_their_tokens():
    lengths = np.array([90, 10, 5, 40, 50, 60, 30])
    for limit, expected in (
        (None, [[90, 10], [60, 40], [50, 30, 5]]),  # each into the batch where the least room remains
        (2, [[90, 10], [60, 40], [50, 30], [5]]),
    ):
        order, bounds = cut_block(
            np.zeros(7, dtype=np.int64), lengths, rule=BatchRule(batch_size=limit, max_tokens=100, padded=False)
        )
        assert sorted(order) == list(range(7))
        assert [lengths[order[start:stop]].tolist() for start, stop in bounds] == expected


def test_packed_batches_are_nearly_full_and_mix_lengths():
    sizes = np.random.default_rng(0).integers(250, 2344, size=2000)
    dataset = Sized(sizes)
    options = {"max_tokens": 4096, "batch_size": None, "mode": "mixed"}
    packed, rows = (batches_of(dataset, padded=padded, **options) for padded in (False, True))
    fewest = -(-int(sizes.sum()) // 4096)
    assert len(packed) <= 1.02 * fewest
    assert len(rows) > 1.25 * fewest
    assert np.median([np.ptp(sizes[batch]) for batch in packed]) > 300


def test_budget_counts_the_longest_of_a_batch_times_its_samples():
    order, bounds = cut_block(
        np.zeros(5, dtype=np.int64), np.array([10, 50, 20, 50, 49]), rule=BatchRule(batch_size=None, max_tokens=100)
    )
    assert order.tolist() == [1, 3, 4, 2, 0]
    assert bounds == [(0, 2), (2, 4), (4, 5)]


def test_sample_longer_than_the_budget_is_rejected():
    with pytest.raises(ValueError, match=r"90 tokens, .*max_tokens 80"):
        ModalityBatchSampler(Sized([10, 90]), batch_size=None, max_tokens=80)


def test_samples_that_need_a_batch_each_and_do_not_divide_among_ranks_are_rejected():
    with pytest.raises(ValueError, match=r"2 ranks; .*raise max_tokens"):
        ModalityBatchSampler(Sized([90] * 5), batch_size=None, max_tokens=100, world_size=2)


@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 4, "max_tokens": 0}])
def test_rule_without_a_limit_is_rejected(options):
    with pytest.raises(ValueError, match=r"batch_size is .*max_tokens is "):
        ModalityBatchSampler(Sized([1, 2]), **options)


def test_mixture_of_data_sets_keeps_the_budget_and_one_number_of_batches():
    parts = [Sized(np.random.default_rng(i).integers(10, 90, size=50 + i), [i] * (50 + i)) for i in range(3)]
    mixed = InterleaveDataset(parts, mixing="equal", stop="first", seed=2)
    counts = set()
    for epoch in range(3):
        sampler = ModalityBatchSampler(mixed, batch_size=None, max_tokens=200, num_epochs=3)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        counts.add(len(batches))
        for batch in batches:
            lengths = [int(parts[part].lengths(np.array([child]))[0]) for part, child in map(mixed.locate, batch)]
            assert max(lengths) * len(batch) <= 200
            assert len({mixed.locate(index)[0] for index in batch}) == 1
    assert len(counts) == 1


def test_locate_all_agrees_with_locate_over_epochs():
    mixed = InterleaveDataset([Sized([1] * 7), Sized([1] * 30), Sized([1] * 12)], mixing="equal", seed=1)
    indices = np.random.default_rng(0).integers(0, 5 * len(mixed), size=300)
    parts, children = mixed.locate_all(indices)
    assert list(zip(parts.tolist(), children.tolist(), strict=True)) == [mixed.locate(i) for i in indices.tolist()]
