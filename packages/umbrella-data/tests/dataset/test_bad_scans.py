"""A bad scan stops the run, or its sample is replaced: by the same one everywhere, recorded, up to a limit."""

from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from umbrella_data.dataset.bad_scans import LIST_NAME, BadScan, BadScanList, TooManyBadScansError
from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.dataset.interleave import InterleaveDataset
from umbrella_data.errors import ScanError, ScanReason, UmbrellaDataError
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.privacy import name_hasher, read_or_create_salt

NUM_TOKENS = {"T1": 3, "rsfMRI": 2, "dMRI": 2}


class Files:
    """A pipeline that returns the number in a scan's name, and raises for some."""

    def __init__(self, *bad):
        self.bad = set(bad)
        self.opened = []

    def __call__(self, paths, *, generator):
        name = paths[0].name.split("_")[0]
        self.opened.append(name)
        if name in self.bad:
            raise ScanError("is damaged", path=paths[0], reason=ScanReason.GZIP_CRC)
        noise = torch.rand((), generator=generator) if generator is not None else 0.0
        return torch.full((1, 2, 2, 2), float(name)) + noise


@pytest.fixture
def make_dataset(make_tokenizer, write_manifest):
    def make(rows, pipeline, *, max_fraction=1.0, folder=None, **options):
        tokenizer = make_tokenizer()
        bad_scans = None if max_fraction is None else BadScanList(max_fraction=max_fraction, folder=folder)
        return ConversationDataset(
            read_manifest(write_manifest(rows)),
            tokenizer=tokenizer,
            image_token_id=tokenizer.ids["<image>"],
            num_image_tokens=NUM_TOKENS,
            pipelines=dict.fromkeys(NUM_TOKENS, pipeline),
            bad_scans=bad_scans,
            **options,
        )

    return make


@pytest.fixture
def rows(make_row):
    kinds = [("T1",), ("dMRI", "T1"), ("rsfMRI",)]
    return [make_row(f"{i}", *kinds[i % 3]) for i in range(30)]


def number(example):
    return int(example.scans[0].volume.floor().min())


def test_bad_scan_by_default_is_raised(make_dataset, rows):
    with pytest.raises(ScanError, match="is damaged"):
        make_dataset(rows, Files("3"), max_fraction=None)[3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_scan_is_raised_with_line_and_subject_from_any_process(make_dataset, rows, num_workers, end_workers):
    dataset = make_dataset(rows, Files("3"), max_fraction=None)
    loader = torch.utils.data.DataLoader(dataset, sampler=[3], batch_size=None, num_workers=num_workers)
    with pytest.raises(UmbrellaDataError) as caught:
        next(iter(loader))
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    subject = dataset.manifest[3].subject
    assert f"line {dataset.manifest.line(3)}, subject {subject}" in message
    assert f"is damaged [{ScanReason.GZIP_CRC}]" in message
    assert "Traceback" not in message


def test_bad_scan_when_skipped_is_replaced_by_another_of_the_same_modalities(make_dataset, rows):
    dataset = make_dataset(rows, Files("3", "4"), augment=False)
    for bad in (3, 4):
        found = {number(dataset[epoch * 30 + bad]) for epoch in range(40)}
        assert found <= {i for i in range(30) if i % 3 == bad % 3 and i != bad}
        assert len(found) > 4  # the replacement differs by epoch
        assert dataset[bad].index == bad
        # The row that was read instead.
        assert dataset[bad].origin.line == dataset.manifest.line(number(dataset[bad]))
        assert tuple(scan.modality for scan in dataset[bad].scans) == dataset.modalities(bad)
    assert number(dataset[5]) == 5


def test_replacement_depends_only_on_seed_and_index(make_dataset, rows):
    first, again, other = (make_dataset(rows, Files("3", "6"), seed=seed) for seed in (1, 1, 2))
    indices = [epoch * 30 + 3 for epoch in range(20)]
    one = {index: first[index].scans[0].volume for index in indices}
    two = {index: again[index].scans[0].volume for index in reversed(indices)}
    assert all(torch.equal(one[index], two[index]) for index in indices)
    assert any(not torch.equal(one[index], other[index].scans[0].volume) for index in indices)
    unpickled = pickle.loads(pickle.dumps(first))
    assert torch.equal(unpickled[3].scans[0].volume, one[3])


def test_replacement_is_not_longer_than_the_original_if_possible(make_dataset, make_row):
    rows = [make_row(f"{i}", "T1", question="why? " * (1 + (i * 7) % 10)) for i in range(40)]
    dataset = make_dataset(rows, Files("5", "20"))
    for index in range(5, 400, 40):
        assert len(dataset[index].input_ids) <= dataset.num_tokens(index)
    # The shortest of all gets the shortest of the others.
    shortest = make_dataset([make_row("0", "T1"), *[make_row(f"{i}", "T1", question="?" * 90 * i) for i in (2, 1, 3)]],
                            Files("0"))  # fmt: skip
    assert number(shortest[0]) == 1


def test_bad_scan_without_replacement_is_raised(make_dataset, make_row):
    dataset = make_dataset([make_row("1", "T1"), make_row("2", "dMRI"), make_row("3", "T1")], Files("1", "3", "2"))
    for index in (0, 1):
        with pytest.raises(ScanError, match="is damaged") as caught:
            dataset[index]
        assert any(note.startswith("no replacement") for note in caught.value.__notes__)


def test_bad_file_is_opened_once_per_process(make_dataset, rows):
    files = Files("3")
    dataset = make_dataset(rows, files)
    for epoch in range(5):
        dataset[epoch * 30 + 3]
    assert files.opened.count("3") == 1


class Arrays:
    """A pipeline that raises for every scan but one, after reading its voxels."""

    def __init__(self):
        self.read = []

    def __call__(self, paths, *, generator):
        if paths[0].name.startswith("0_"):
            return torch.zeros(1, 2, 2, 2)
        voxels = np.zeros((2, 2, 2))
        self.read.append(weakref.ref(voxels))
        try:
            raise ValueError(f"{len(voxels)} slices are bad")
        except ValueError as error:
            raise ScanError("is damaged", path=paths[0], reason=ScanReason.GZIP_CRC) from error


def test_bad_scans_leave_no_voxels_in_memory(make_dataset, make_row):
    arrays = Arrays()
    dataset = make_dataset([make_row(f"{i}", "T1") for i in range(6)], arrays)
    for index in (1, 2, 3, 7):
        dataset[index]
    with pytest.raises(ScanError) as caught:
        arrays([Path("4_0.nii")], generator=None)
    dataset.leave_out(4, caught.value)
    del caught
    gc.collect()
    assert len(arrays.read) > 4
    assert not any(reference() is not None for reference in arrays.read)


def test_run_when_too_many_scans_are_bad_stops(make_dataset, rows):
    dataset = make_dataset(rows, Files("0", "1", "2", "3"), max_fraction=0.1)
    for index in (0, 1, 2, 2, 30, 31):
        dataset[index]
    with pytest.raises(TooManyBadScansError, match=r"4 of 30 samples .*max_fraction 0\.1 .*max_bad_fraction"):
        dataset[3]
    with pytest.raises(TooManyBadScansError):
        make_dataset(rows, Files("0"), max_fraction=0)[0]
    with pytest.raises(ValueError, match="max_fraction is 2"):
        BadScanList(max_fraction=2)


def test_limit_is_a_fraction_of_the_whole_manifest_for_a_part_of_it(make_dataset, rows):
    dataset = make_dataset(rows, Files("0"), max_fraction=0.1)
    dataset.manifest = dataset.manifest.select([0, 3, 6])
    assert number(dataset[0]) in (3, 6)


def test_skipped_samples_are_listed_by_hash_and_logged_by_name(make_dataset, rows, tmp_path, caplog):
    dataset = make_dataset(rows, Files("3", "4"), folder=tmp_path / "run")
    for index in (3, 4, 33, 5):
        dataset[index]
    text = (tmp_path / "run" / LIST_NAME).read_text()
    listed = [json.loads(line) for line in text.splitlines()]
    assert [(row["line"], row["reason"]) for row in listed] == [(4, "gzip_crc"), (5, "gzip_crc")]
    name_hash = name_hasher(read_or_create_salt(tmp_path / "run" / "salt"))
    assert [row["subject"] for row in listed] == [name_hash("sub-3"), name_hash("sub-4")]
    assert listed[0]["scan"] == name_hash(str(tmp_path / "3_0.nii.gz"))
    assert not any(word in text for word in ("sub-", ".nii", "jsonl", str(tmp_path)))
    assert "subject sub-3" in caplog.text
    assert "3_0.nii.gz" in caplog.text


def test_folder_of_the_list_can_be_a_str(make_dataset, rows, tmp_path):
    make_dataset(rows, Files("3"), folder=str(tmp_path / "run"))[3]
    assert (tmp_path / "run" / LIST_NAME).is_file()


def _add(folder: Path, first: int) -> None:
    bad_scans = BadScanList(max_fraction=1, folder=folder)
    for line in range(first, first + 40):
        error = ScanError("x", path=f"{line}.nii", reason=ScanReason.MISSING)
        bad_scans.add(BadScan(manifest=Path("m"), line=line, num_rows=1000, subject="s", error=error))


def test_processes_share_one_list_and_one_count(tmp_path):
    read_or_create_salt(tmp_path / "salt")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = [json.loads(line)["line"] for line in (tmp_path / LIST_NAME).read_text().splitlines()]
    assert set(lines) == set(range(80))
    strict = BadScanList(max_fraction=0.08, folder=tmp_path)
    error = ScanError("x", path="new.nii", reason=ScanReason.MISSING)
    with pytest.raises(TooManyBadScansError, match="81 of 1000"):
        strict.add(BadScan(manifest=Path("m"), line=500, num_rows=1000, subject="s", error=error))
    # Another manifest is counted separately.
    strict.add(BadScan(manifest=Path("n"), line=500, num_rows=1000, subject="s", error=error))


def test_mixture_is_the_same_in_every_process_with_bad_scans(make_dataset, rows):
    def epoch(mixed):
        return [number(mixed[i]) for i in range(len(mixed))]

    first, again = (InterleaveDataset([make_dataset(rows, Files("3", "7", "11"), augment=False)]) for _ in range(2))
    assert epoch(first) == epoch(again)
    assert not {3, 7, 11} & set(epoch(first))
