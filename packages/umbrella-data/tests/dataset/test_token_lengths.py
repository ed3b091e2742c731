"""Lengths measured in bulk equal the lengths of the examples, and are saved."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.dataset import token_lengths
from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.manifest.row_columns import modality_mask

# Optional dependencies; both are installed with a Hugging Face tokenizer.
pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_TOKENS = {"T1": 30, "rsfMRI": 200, "dMRI": 20}


@pytest.fixture
def make_dataset(write_manifest, tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "what", "is", "it", "a", "brain", "?"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})

    def make(rows, **options):
        path = write_manifest(rows)
        return ConversationDataset(
            read_manifest(path, index_dir=tmp_path / "indexes"),
            tokenizer=tokenizer,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            num_image_tokens=NUM_TOKENS,
            pipelines=dict.fromkeys(NUM_TOKENS, lambda paths, *, generator: None),
            **options,
        )

    return make


@pytest.fixture
def rows(make_row):
    rows = [make_row("a", "T1"), make_row("b", "dMRI", "T1", question="what is it? " * 9), make_row("c"), make_row("d")]
    rows[3]["messages"] += make_row("e", "rsfMRI", question="a brain?", answer="is it?")["messages"]
    return rows


@pytest.mark.parametrize("max_length", [None, 240])
def test_lengths_and_modalities_are_those_of_the_examples(make_dataset, rows, max_length):
    rows[3]["messages"] = make_dataset_turns(rows)
    dataset = make_dataset(rows, max_length=max_length)
    indices = np.array([3, 0, 1, 2, 7, 4])
    assert dataset.lengths(indices).tolist() == [dataset.num_tokens(index) for index in indices.tolist()]
    masks = [modality_mask(dataset.modalities(index)) for index in indices.tolist()]
    assert dataset.modality_masks(indices).tolist() == masks
    assert dataset.modalities(3) == (("T1", "rsfMRI") if max_length is None else ("rsfMRI",))


def make_dataset_turns(rows):
    """The turns of row d, a T1 scan in the first of them."""
    image = {"type": "image", "modality": "T1", "path": "x.nii.gz"}
    first, *others = rows[3]["messages"]
    return [{**first, "content": [image, *first["content"]]}, *others]


def test_saved_lengths_are_used_only_for_the_same_model(make_dataset, rows, monkeypatch):
    lengths = make_dataset(rows).lengths(np.arange(4))
    measured = []
    measure = token_lengths._measure
    monkeypatch.setattr(token_lengths, "_measure", lambda *args: measured.append(1) or measure(*args))
    assert make_dataset(rows).lengths(np.arange(4)).tolist() == lengths.tolist()
    assert not measured
    make_dataset(rows, max_length=400).lengths(np.arange(4))
    assert len(measured) == 1
    monkeypatch.setitem(NUM_TOKENS, "T1", 31)
    assert make_dataset(rows).lengths(np.arange(4)).tolist() == (lengths + np.array([1, 1, 0, 0])).tolist()
    assert len(measured) == 2


def test_error_names_all_rows_that_cannot_be_measured(make_dataset, rows, make_row):
    bad = make_row("x")
    bad["messages"] = bad["messages"][:1]
    dataset = make_dataset([rows[0], bad, rows[1], make_row("y", question="what " * 99)], max_length=70)
    with pytest.raises(ManifestError) as caught:
        dataset.lengths(np.array([0]))
    assert [problem[:7] for problem in caught.value.problems] == ["line 2:", "line 3:", "line 4:"]


def test_saved_lengths_are_those_of_their_decimals(make_dataset, make_row, tmp_path):
    row = make_row("a", "T1", answer="41.23")
    row |= {"answer": {"type": "number", "value": 41.23}}
    measured = {
        decimals: make_dataset([row], number_decimals=decimals, max_length=100) for decimals in (None, 0, 2, None, 0)
    }
    for dataset in measured.values():
        assert dataset.lengths(np.arange(1)).tolist() == [len(dataset[0].input_ids)]
    assert len(list((tmp_path / "indexes").glob("*.lengths-*"))) == 3


def test_part_of_a_manifest_has_its_own_lengths(make_dataset, rows, tmp_path):
    dataset = make_dataset(rows, max_length=250)
    whole = dataset.lengths(np.arange(4))
    for chosen in ([3, 1], [0], [2, 3]):
        part = make_dataset(rows, max_length=250)
        part.manifest = part.manifest.select(chosen)
        assert part.lengths(np.arange(len(chosen))).tolist() == whole[chosen].tolist()
        assert [part.modalities(i) for i in range(len(chosen))] == [dataset.modalities(row) for row in chosen]
        assert part.modality_sets() == {frozenset(dataset.modalities(row)) for row in chosen}
    assert len(list((tmp_path / "indexes").glob("*.lengths-*"))) == 1
