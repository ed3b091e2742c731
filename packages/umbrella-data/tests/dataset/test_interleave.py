"""The mixture is a pure function of the index: every sample once per epoch, for any number of workers and ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from umbrella_data.batch.collator import PaddingCollator
from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.dataset.interleave import InterleaveDataset
from umbrella_data.dataset.sampler import ModalityBatchSampler
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.manifest.row_columns import modality_mask

NUM_TOKENS = {"T1": 3, "rsfMRI": 2, "dMRI": 4}


class Numbers:
    """A fake data set: its example is the index itself."""

    is_epoch_constant = True

    def __init__(self, size, *modalities):
        self.size = size
        self.modalities_of = modalities

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    def modalities(self, index):
        return self.modalities_of

    def modality_masks(self, indices):
        return np.full(len(indices), modality_mask(self.modalities_of))

    def lengths(self, indices):
        return indices

    def modality_sets(self):
        return frozenset([frozenset(self.modalities_of)])


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, epoch=st.integers(0, 5), seed=st.integers(0, 2**40))
def test_epoch_when_proportional_holds_every_sample_exactly_once(sizes, epoch, seed):
    mixed = InterleaveDataset([Numbers(size) for size in sizes], seed=seed)
    assert len(mixed) == sum(sizes)
    found = Counter(mixed.locate(epoch * len(mixed) + i) for i in range(len(mixed)))
    assert found == Counter((k, epoch * size + i) for k, size in enumerate(sizes) for i in range(size))
    assert mixed.is_epoch_constant


@settings(max_examples=50, deadline=None)
@given(
    sizes=SIZES,
    seed=st.integers(0, 2**40),
    mixing=st.sampled_from(["proportional", "equal", "temperature"]),
    stop=st.sampled_from(["all", "first"]),
)
def test_epochs_of_any_mixing_draw_each_part_evenly(sizes, seed, mixing, stop):
    temperature = 2.0 if mixing == "temperature" else None
    mixed = InterleaveDataset(
        [Numbers(size) for size in sizes], mixing=mixing, temperature=temperature, stop=stop, seed=seed
    )
    found = Counter(mixed.locate(index) for index in range(3 * len(mixed)))
    # Draws of a part are numbered without a gap across epochs, so each of its samples is drawn equally often.
    assert found == Counter((k, i) for k, draws in enumerate(mixed.draws) for i in range(3 * draws))


def test_draws_follow_the_mixing():
    def draws(**options):
        return InterleaveDataset([Numbers(100), Numbers(25)], **options).draws

    assert draws() == (100, 25)
    assert draws(mixing="equal") == (100, 100)
    assert draws(mixing="equal", stop="first") == (25, 25)
    assert draws(mixing="temperature", temperature=2.0) == (100, 50)
    assert draws(mixing="temperature", temperature=1.0) == (100, 25)
    assert draws(mixing=[1.0, 3.0]) == (100, 300)
    assert draws(mixing=[1.0, 3.0], stop="first") == (8, 25)


def test_order_differs_by_epoch_and_by_seed():
    def order(epoch, seed=0):
        mixed = InterleaveDataset([Numbers(30), Numbers(20)], seed=seed)
        return [mixed.locate(epoch * 50 + i) for i in range(50)]

    def samples(located):
        return [(k, child % (30, 20)[k]) for k, child in located]

    assert order(0) == order(0)
    assert samples(order(0)) != samples(order(1))
    assert order(0) != order(0, seed=1)
    assert len({k for k, _ in order(0)[:15]}) == 2


def test_list_of_the_mixture_is_one_epoch():
    mixed = InterleaveDataset([Numbers(3), Numbers(2)])
    assert len(list(mixed)) == 5
    assert list(mixed) == [mixed[i] for i in range(5)]
    with pytest.raises(IndexError, match="-1"):
        mixed[-1]


def test_modalities_come_from_the_part():
    mixed = InterleaveDataset([Numbers(3, "T1"), Numbers(2, "dMRI", "T1")])
    found = Counter(mixed.modalities(i) for i in range(5))
    assert found == {("T1",): 3, ("dMRI", "T1"): 2}
    assert mixed.modality_sets() == {frozenset({"T1"}), frozenset({"T1", "dMRI"})}


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ([], {}, "sizes"),
        ([3, 0], {}, r"sizes .*\[3, 0\]"),
        ([3, 2], {"mixing": "even"}, "mixing is 'even'"),
        ([3, 2], {"mixing": [1.0]}, r"weights are \[1\.0\]"),
        ([3, 2], {"mixing": [1.0, -1.0]}, r"weights are \[1\.0, -1\.0\]"),
        ([3, 2], {"mixing": "temperature"}, "temperature None"),
        ([3, 2], {"temperature": 2.0}, r"temperature 2\.0"),
        ([3, 2], {"mixing": "temperature", "temperature": 0.0}, r"temperature is 0\.0"),
        ([3, 2], {"stop": "never"}, "stop is 'never'"),
    ],
)
def test_invalid_arguments_are_rejected(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        InterleaveDataset([Numbers(size) for size in sizes], **options)


def volume_of(paths, *, generator):
    noise = torch.rand((), generator=generator)
    return torch.full((1, 2, 2, 2), float(paths[0].name.split("_")[0])) + 0.5 * noise


@pytest.fixture
def mixture(make_tokenizer, make_row, write_manifest):
    """Three real data sets of 7, 5 and 4 samples; scan k of the 16 samples has the number k."""
    tokenizer, datasets, first = make_tokenizer(), [], 0
    for modality, size in (("T1", 7), ("rsfMRI", 5), ("dMRI", 4)):
        rows = [make_row(str(first + i), modality) for i in range(size)]
        first += size
        datasets.append(
            ConversationDataset(
                read_manifest(write_manifest(rows, f"{modality}.jsonl")),
                tokenizer=tokenizer,
                image_token_id=tokenizer.ids["<image>"],
                num_image_tokens=NUM_TOKENS,
                pipelines=dict.fromkeys(NUM_TOKENS, volume_of),
                seed=3,
            )
        )
    return InterleaveDataset(datasets, seed=3)


def epoch_of(mixture, *, epoch, num_workers, world_size, mode, loader=None):
    """The volumes of each batch of one epoch as numbers, over all ranks; and the number of batches of each rank."""
    batches, counts = [], []
    for rank in range(world_size):
        sampler = ModalityBatchSampler(mixture, batch_size=3, mode=mode, seed=5, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        loader = DataLoader(
            mixture,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=PaddingCollator(pad_token_id=0, modality_order=list(NUM_TOKENS)),
        )
        of_rank = [batch["pixel_values"] for batch in loader]
        counts.append(len(of_rank))
        assert len(of_rank) == len(loader) == len(sampler)
        batches += of_rank
    return batches, counts


def numbers(batches):
    return sorted(float(v) for batch in batches for volumes in batch.values() for v in volumes.flatten(1)[:, 0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("mode", ["by_modality", "mixed"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_epoch_over_workers_and_ranks_delivers_every_sample_exactly_once(mixture, num_workers, world_size, mode):
    batches, counts = epoch_of(mixture, epoch=2, num_workers=num_workers, world_size=world_size, mode=mode)
    assert [int(number) for number in numbers(batches)] == list(range(16))
    assert len(set(counts)) == 1
    if mode == "by_modality":
        assert all(len(batch) == 1 for batch in batches)
    # Augmentation is the same as without workers and ranks.
    alone = [mixture[2 * 16 + i].scans[0].volume[0, 0, 0, 0].item() for i in range(16)]
    assert numbers(batches) == sorted(alone)


def test_epochs_when_workers_persist_follow_set_epoch(mixture):
    sampler = ModalityBatchSampler(mixture, batch_size=3, seed=5)
    loader = DataLoader(
        mixture,
        batch_sampler=sampler,
        num_workers=2,
        persistent_workers=True,
        collate_fn=PaddingCollator(pad_token_id=0, modality_order=list(NUM_TOKENS)),
    )
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = numbers([batch["pixel_values"] for batch in loader])
        assert [int(number) for number in found] == list(range(16))
        seen.append(tuple(found))
    assert len(set(seen)) == 3
