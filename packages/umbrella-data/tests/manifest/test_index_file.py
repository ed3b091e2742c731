"""The saved index of a manifest is used for the content that it was built from, and built again for any other."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest import manifest as manifest_module
from umbrella_data.manifest.manifest import Manifest, read_manifest
from umbrella_data.manifest.row_columns import modality_mask


@pytest.fixture
def rows(make_row):
    return [make_row("a", "T1"), make_row("b", "dwi", "T1w", question="é?"), make_row("c"), make_row("d", "T1")]


@pytest.fixture
def indexed(rows, write_manifest, tmp_path):
    """A manifest with its saved index."""
    path = write_manifest(rows)
    read_manifest(path, index_dir=tmp_path / "indexes").index_rows()
    return path


def is_saved(manifest: Manifest) -> bool:
    """Whether a manifest was opened with a saved index."""
    return manifest._facts is not None


def test_facts_are_modalities_text_lengths_and_image_tokens(rows, write_manifest):
    facts = read_manifest(write_manifest(rows)).facts
    assert [facts.modalities(row) for row in range(4)] == [("T1",), ("dMRI", "T1"), (), ("T1",)]
    assert facts.arrays["text_bytes"].tolist() == [len(b"What is it?a brain"), len("é?a brain".encode()), 18, 18]
    masks = [modality_mask(names) for names in (["T1"], ["T1", "dMRI"], [])]
    assert facts.masks(np.array([0, 1, 2, 3])).tolist() == [*masks, masks[0]]
    assert len(set(masks)) == 3
    assert facts.image_tokens(np.array([3, 2, 1]), num_image_tokens={"T1": 5, "dMRI": 7}).tolist() == [5, 0, 12]
    assert facts.modality_sets() == {frozenset({"T1"}), frozenset({"T1", "dMRI"}), frozenset()}
    with pytest.raises(ValueError, match="dMRI"):
        facts.image_tokens(np.array([0]), num_image_tokens={"T1": 5})


def test_facts_of_invalid_rows_raise_all_their_problems(rows, write_manifest):
    path = write_manifest([rows[0], {"messages": [{"content": 3}]}, rows[1], {"id": 3}])
    with pytest.raises(ManifestError) as caught:
        read_manifest(path).facts  # noqa: B018
    assert [problem[:7] for problem in caught.value.problems] == ["line 2:", "line 4:"]


def test_saved_index_is_mapped_without_reading_a_row(indexed, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "index_rows", None)
    monkeypatch.setattr(manifest_module, "collect_facts", None)
    manifest = read_manifest(indexed, index_dir=tmp_path / "indexes")
    assert is_saved(manifest)
    assert [sample.id for sample in manifest] == list("abcd")
    assert [manifest.modalities(row) for row in range(4)] == [("T1",), ("dMRI", "T1"), (), ("T1",)]
    assert manifest.line(3) == 4


def test_index_contains_no_names_of_subjects_or_files(indexed, tmp_path):
    (saved,) = (tmp_path / "indexes").iterdir()
    content = saved.read_bytes()
    assert b"sub-" not in content
    assert b"nii" not in content
    assert b"manifest.jsonl" not in content + saved.name.encode()


def test_index_is_built_again_when_the_manifest_has_changed(indexed, rows, tmp_path):
    indexed.write_text(indexed.read_text().replace('"T1w"', '"fMRI"'))  # one byte more
    manifest = read_manifest(indexed, index_dir=tmp_path / "indexes")
    assert not is_saved(manifest)
    assert manifest.facts.modalities(1) == ("dMRI", "rsfMRI")
    assert is_saved(read_manifest(indexed, index_dir=tmp_path / "indexes"))


def test_index_is_built_again_when_the_content_has_changed_but_not_its_length(indexed, tmp_path):
    indexed.write_text(indexed.read_text().replace('"dwi"', '"DTI"'))
    os.utime(indexed, ns=(5, 5))
    assert not is_saved(read_manifest(indexed, index_dir=tmp_path / "indexes"))


def test_index_is_used_when_the_manifest_was_copied_or_touched(indexed, tmp_path):
    os.utime(indexed, ns=(5, 5))
    assert is_saved(read_manifest(indexed, index_dir=tmp_path / "indexes"))


def test_damaged_index_is_built_again(indexed, tmp_path):
    (saved,) = (tmp_path / "indexes").iterdir()
    saved.write_bytes(saved.read_bytes()[:-1])
    manifest = read_manifest(indexed, index_dir=tmp_path / "indexes")
    assert not is_saved(manifest)
    assert manifest.facts.modalities(0) == ("T1",)
    assert is_saved(read_manifest(indexed, index_dir=tmp_path / "indexes"))


def test_index_of_a_large_manifest_is_next_to_it_or_in_the_users_cache(rows, write_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "SAVE_FROM_ROWS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = write_manifest(rows)
    read_manifest(path).index_rows()
    assert path.with_name(".manifest.jsonl.index").is_file()
    assert not (tmp_path / "home").exists()
    path.with_name(".manifest.jsonl.index").unlink()
    path.with_name(".manifest.jsonl.index").mkdir()  # cannot be written, even by root
    read_manifest(path).index_rows()
    assert len(list((tmp_path / "home").rglob("*.index"))) == 1
    assert is_saved(read_manifest(path))


def test_index_of_a_small_manifest_is_not_saved(rows, write_manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read_manifest(write_manifest(rows)).index_rows()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


def test_manifest_with_a_saved_index_is_pickled_as_a_path(rows, write_manifest, tmp_path):
    path = write_manifest(rows * 200)
    read_manifest(path, index_dir=tmp_path / "indexes").index_rows()
    manifest = read_manifest(path, index_dir=tmp_path / "indexes")
    content = pickle.dumps(manifest)
    assert len(content) < 2000
    assert pickle.loads(content)[5] == manifest[5]
    # An index that this process has just saved is mapped, too.
    assert len(pickle.dumps(read_manifest(path, index_dir=tmp_path / "other"))) > 8 * 800
    fresh = read_manifest(path, index_dir=tmp_path / "other")
    fresh.index_rows()
    assert len(pickle.dumps(fresh)) < 2000


def test_progress_is_called_with_every_row(rows, write_manifest):
    seen = []
    read_manifest(write_manifest(rows)).index_rows(progress=lambda numbers: seen.extend(numbers) or range(4))
    assert seen == [0, 1, 2, 3]


def test_line_numbers_count_blank_lines(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    read_manifest(path, index_dir=tmp_path / "i").index_rows()
    again = read_manifest(path, index_dir=tmp_path / "i")
    assert is_saved(again)
    assert [again.line(row) for row in range(4)] == [1, 3, 5, 7]


def test_manifest_with_a_saved_index_needs_no_memory_per_row(make_row, write_manifest, tmp_path):
    path = write_manifest([make_row(f"{i}", "T1") for i in range(30_000)])
    read_manifest(path, index_dir=tmp_path / "indexes").index_rows()

    def read_some(num_rows: int) -> Manifest:
        manifest = read_manifest(path, index_dir=tmp_path / "indexes")
        for row in range(0, 15 * num_rows, 15):
            assert manifest[row].id == str(row)
            assert manifest.modalities(row) == ("T1",)
        return manifest

    read_some(100)  # allocations that are made once
    kept = []
    for num_rows in (100, 2_000):
        tracemalloc.start()
        manifest = read_some(num_rows)
        # pathlib interns names: the table of the process may grow by megabytes at any of them.
        snapshot = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(inclusive=False, filename_pattern=pathlib.__file__)]
        )
        kept.append(sum(trace.size for trace in snapshot.traces))
        tracemalloc.stop()
        assert len(manifest) == 30_000
    # Offsets and columns in memory would need 20 bytes per row: 600 kB.
    assert max(kept) < 300_000


def test_selected_rows_use_the_saved_index_and_write_none(indexed, tmp_path, monkeypatch):
    (saved,) = (tmp_path / "indexes").iterdir()
    content = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "collect_facts", None)
        part = read_manifest(indexed, index_dir=tmp_path / "indexes").select([2, 1])
        assert [part.facts.modalities(row) for row in range(2)] == [(), ("dMRI", "T1")]
    saved.unlink()
    part = read_manifest(indexed, index_dir=tmp_path / "indexes").select([2, 1])
    assert part.facts.arrays["text_bytes"].tolist() == [18, len("é?a brain".encode())]
    assert [path.read_bytes() for path in (tmp_path / "indexes").iterdir()] == [content]
