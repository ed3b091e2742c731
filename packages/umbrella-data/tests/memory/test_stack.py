"""Batches in reused memory have the values of single reads, and memory in use is not reused."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from umbrella_data import ConversationDataset, InterleaveDataset, PaddingCollator, read_manifest
from umbrella_data.cache.store import VolumeCache
from umbrella_data.dataset.bad_scans import BadScanList
from umbrella_data.memory.shared_pool import SharedTensor, stack
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig

SHAPE = (1, 4, 4, 4)
NAMES = "abcdef"


@pytest.fixture
def make_mixed(make_tokenizer, write_manifest, tmp_path):
    """A maker of data sets of cached scans of T1 and dMRI."""

    def make(rows, **options):
        tokenizer = make_tokenizer()
        cache = VolumeCache(tmp_path / "cache")
        config = PipelineConfig(image_size=SHAPE[1:])
        dataset = ConversationDataset(
            read_manifest(write_manifest(rows)),
            tokenizer=tokenizer,
            image_token_id=tokenizer.ids["<image>"],
            num_image_tokens={"T1": 2, "dMRI": 3},
            pipelines={name: Pipeline(config, modality=name, cache=cache) for name in ("T1", "dMRI")},
            **options,
        )
        return InterleaveDataset([dataset])

    return make


@pytest.fixture
def mixed(nifti, random_voxels, make_mixed, make_row):
    """Six cached T1 scans; the last sample has two of them."""
    for seed, name in enumerate(NAMES):
        nifti.write(random_voxels(6, 6, 6, seed=seed), f"{name}_0.nii.gz")
    nifti.write(random_voxels(6, 6, 6, seed=99), "f_1.nii.gz")
    return make_mixed([make_row(name, *["T1"] * (2 if name == "f" else 1)) for name in NAMES])


@pytest.fixture
def collate():
    return PaddingCollator(pad_token_id=0, modality_order=["T1", "dMRI"])


def named(mixed, *batches):
    """The indices of samples by their names."""
    index_of = {mixed.sample(i).id: i for i in range(len(mixed))}
    return [[index_of[name] for name in batch] for batch in batches]


def assert_batches_are_those_of_single_reads(mixed, collate, batches, **options):
    # All batches are alive together, those that a worker reads ahead among them.
    loaded = list(DataLoader(mixed, batch_sampler=batches, collate_fn=collate, **options))
    assert len(loaded) == len(batches)
    for indices, batch in zip(batches, loaded, strict=True):
        single = collate([mixed[i] for i in indices])
        assert list(batch["pixel_values"]) == list(single["pixel_values"])
        for modality, pixels in single["pixel_values"].items():
            assert torch.equal(batch["pixel_values"][modality], pixels)
            assert batch["pixel_values"][modality].dtype == pixels.dtype == torch.float16
        assert torch.equal(batch["input_ids"], single["input_ids"])
    return loaded


LOADERS = [{"num_workers": 0}, {"num_workers": 1, "prefetch_factor": 6}]


@pytest.mark.parametrize("options", LOADERS, ids=["here", "worker"])
def test_batches_of_a_loader_are_those_of_single_reads(mixed, collate, options):
    batches = [[0, 1, 2], [3, 4, 5], [2], [5, 5, 0], [4, 3, 1], [2, 1, 0]]
    assert_batches_are_those_of_single_reads(mixed, collate, batches, **options)


@pytest.mark.parametrize("options", LOADERS, ids=["here", "worker"])
def test_batches_of_two_modalities_are_those_of_single_reads(
    nifti, random_voxels, make_mixed, make_row, collate, options
):
    rng = np.random.default_rng(0)
    rows = []
    for name, modalities in (("a", ["T1"]), ("b", ["dMRI"]), ("c", ["dMRI", "T1"]), ("d", ["T1", "dMRI", "T1"])):
        row = make_row(name, *modalities)
        for i, modality in enumerate(modalities):
            if modality == "T1":
                nifti.write(random_voxels(6, 6, 6, seed=len(rows)), f"{name}_{i}.nii.gz")
                continue
            maps = [f"{name}_{i}_{kind}.nii.gz" for kind in ("fa", "md")]
            for path, scale in zip(maps, (1.0, 1e-3), strict=True):
                nifti.write(rng.random((6, 6, 6), dtype=np.float32) * np.float32(scale), path)
            row["messages"][0]["content"][i]["path"] = maps
        rows.append(row)
    mixed = make_mixed(rows)
    batches = named(mixed, "abc", "ba", "dcb", "a", "b", "dd")
    loaded = assert_batches_are_those_of_single_reads(mixed, collate, batches, **options)
    assert {key: value.shape for key, value in loaded[2]["pixel_values"].items()} == {
        "T1": (3, *SHAPE),
        "dMRI": (3, 2, *SHAPE[1:]),
    }


@pytest.mark.parametrize("options", LOADERS, ids=["here", "worker"])
def test_batches_are_those_of_single_reads_when_a_scan_half_way_is_bad(
    nifti, random_voxels, make_mixed, make_row, collate, options
):
    for seed, name in enumerate(("a_0", "b_0", "c_0", "d_0", "d_1", "e_0", "e_1")):
        nifti.write(random_voxels(6, 6, 6, seed=seed), f"{name}.nii.gz")
    rows = [make_row(name, *["T1"] * (2 if name in "de" else 1)) for name in "abcde"]
    # Another sample replaces each; the first scan of `d` has taken its place by then.
    for name in ("b_0", "d_1"):
        (nifti.folder / f"{name}.nii.gz").write_bytes(b"no scan")
    mixed = make_mixed(rows, bad_scans=BadScanList(max_fraction=1.0))
    batches = named(mixed, "abc", "adc", "deb", "bba")
    assert_batches_are_those_of_single_reads(mixed, collate, batches, **options)


class WhereItIs:
    """Collates, and returns whether the batch is in shared memory."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        return get_worker_info() is not None, isinstance(self.collate(examples)["pixel_values"]["T1"], SharedTensor)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_a_worker_are_in_shared_memory(mixed, collate, num_workers):
    loader = DataLoader(mixed, batch_size=3, collate_fn=WhereItIs(collate), num_workers=num_workers)
    assert list(loader) == [(num_workers > 0, num_workers > 0)] * 2


def test_single_examples_are_copied_into_their_batch(mixed, collate):
    examples = [mixed[0], mixed[1]]
    pixels = collate(examples)["pixel_values"]["T1"]
    pixels.zero_()
    assert examples[0].scans[0].volume.any()


def test_memory_of_a_batch_in_use_is_not_used_again(mixed, collate):
    kept = collate([mixed[i] for i in range(3)])["pixel_values"]["T1"]
    row, before = kept[1], kept[1].clone()
    del kept  # a view of a part keeps the whole
    others = [collate([mixed[i] for i in range(3, 6)])["pixel_values"]["T1"] for _ in range(6)]
    assert torch.equal(row, before)
    assert len({other.data_ptr() for other in others} | {row.data_ptr()}) == 7


def test_memory_of_a_batch_that_is_gone_is_used_again():
    def address() -> int:
        return stack([torch.zeros(1, 5, 5, 7)] * 3).data_ptr()

    first = address()
    gc.collect()
    assert address() == first


def test_volumes_of_two_types_are_stacked():
    volumes = [torch.ones(SHAPE), torch.full(SHAPE, 2.0, dtype=torch.float16)]
    assert torch.equal(stack(volumes), torch.stack(volumes))
