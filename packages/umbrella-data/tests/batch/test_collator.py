"""Batches are padded to the longest row and tagged by modality; scans that do not match the text are rejected."""

from __future__ import annotations

import pytest
import torch

from umbrella_data.batch.collator import PaddingCollator
from umbrella_data.dataset.conversation import Example, ExampleScan

IMAGE, PAD = 9, 0
NUM_TOKENS = {"T1": 2, "rsfMRI": 3, "dMRI": 4}
SHAPES = {"T1": (1, 2, 2, 2), "rsfMRI": (1, 2, 2, 2, 5), "dMRI": (2, 3, 3, 3)}


def example(*parts, index=0):
    """Text tokens and scans in reading order: `example(5, ("T1", 7.0), 6)`; the last token has a loss."""
    ids, scans = [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        modality, value = part
        volume = torch.full(SHAPES[modality], value)
        scans.append(ExampleScan(modality, volume, start=len(ids), num_tokens=NUM_TOKENS[modality]))
        ids += [IMAGE] * NUM_TOKENS[modality]
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, -100)
    labels[-1] = input_ids[-1]
    return Example(input_ids, labels, tuple(scans), index)


@pytest.fixture
def collator():
    return PaddingCollator(pad_token_id=PAD, modality_order=["rsfMRI", "T1", "dMRI"])


def test_batch_when_rows_differ_in_length_is_padded_to_the_longest(collator):
    batch = collator([example(5, ("T1", 1.0), 6), example(7)])
    assert batch["input_ids"].tolist() == [[5, 9, 9, 6], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6], [7, -100, -100, -100]]
    assert batch["modality_ids"].tolist() == [[0, 2, 2, 0], [0, 0, 0, 0]]
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels", "modality_ids")} == {torch.int64}


def test_batch_when_padded_on_the_left_ends_with_the_text():
    collator = PaddingCollator(pad_token_id=PAD, modality_order=["T1"], padding_side="left")
    batch = collator([example(5, ("T1", 1.0), 6, 6), example(("T1", 2.0), 7)])
    assert batch["input_ids"].tolist() == [[5, 9, 9, 6, 6], [0, 0, 9, 9, 7]]
    assert batch["modality_ids"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_scans_of_a_modality_are_stacked_in_reading_order(collator):
    batch = collator(
        [
            example(5, ("T1", 1.0), 5, ("dMRI", 2.0), ("T1", 3.0), 6),
            example(5),
            example(("T1", 4.0), ("rsfMRI", 5.0), 6),
        ]
    )
    values = {modality: volumes.flatten(1)[:, 0].tolist() for modality, volumes in batch["pixel_values"].items()}
    assert values == {"rsfMRI": [5.0], "T1": [1.0, 3.0, 4.0], "dMRI": [2.0]}
    assert batch["pixel_values"]["rsfMRI"].shape == (1, 1, 2, 2, 2, 5)
    assert batch["modality_ids"].tolist() == [
        [0, 2, 2, 0, 3, 3, 3, 3, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [2, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    ]


def test_counts_when_the_batch_is_valid_agree(collator):
    batch = collator([example(5, ("T1", 1.0), ("T1", 2.0), 6), example(("rsfMRI", 1.0), 6)])
    for tag, modality in enumerate(["rsfMRI", "T1", "dMRI"], start=1):
        num_scans = len(batch["pixel_values"].get(modality, ()))
        assert int((batch["modality_ids"] == tag).sum()) == num_scans * NUM_TOKENS[modality]


def test_modality_when_absent_is_no_key(collator):
    assert list(collator([example(("T1", 1.0), 6)])["pixel_values"]) == ["T1"]
    assert collator([example(5, 6)])["pixel_values"] == {}


def replace_scan(original, **changes):
    scan = ExampleScan(**{**original.scans[0].__dict__, **changes})
    return Example(original.input_ids, original.labels, (scan, *original.scans[1:]), original.index)


def test_scan_when_its_run_is_too_short_is_rejected_with_both_counts(collator):
    wrong = replace_scan(example(5, ("T1", 1.0), 6), num_tokens=1)
    with pytest.raises(ValueError, match=r"2 image tokens.* 1 position"):
        collator([wrong])


def test_scan_when_its_run_covers_text_is_rejected(collator):
    with pytest.raises(ValueError, match=r"tokens \[6, 9\]"):
        collator([replace_scan(example(5, ("T1", 1.0), 6), num_tokens=3)])
    with pytest.raises(ValueError, match=r"positions 1 to 4, .*positions 0 to 3"):
        collator([replace_scan(example(5, ("T1", 1.0), 6), num_tokens=4)])


def test_scans_when_they_overlap_are_rejected(collator):
    good = example(5, ("T1", 1.0), ("T1", 1.0), 6)
    wrong = Example(good.input_ids, good.labels, (good.scans[0], good.scans[0]), 0)
    with pytest.raises(ValueError, match="positions 3 to 5 "):
        collator([wrong])


def test_image_token_without_a_scan_is_rejected(collator):
    with pytest.raises(ValueError, match=r"3 image tokens.* 2 position"):
        collator([example(IMAGE, ("T1", 1.0), 6)])


def test_pad_token_equal_to_the_image_token_is_no_scan():
    collator = PaddingCollator(pad_token_id=IMAGE, modality_order=["T1"])
    assert collator([example(5, ("T1", 1.0), 6), example(7)])["modality_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_modality_when_not_in_the_order_is_rejected():
    with pytest.raises(ValueError, match=r"dMRI .*modality_order is T1"):
        PaddingCollator(pad_token_id=PAD, modality_order=["T1"])([example(("dMRI", 1.0), 6)])


def test_volumes_when_shapes_differ_are_rejected_with_both(collator):
    wrong = replace_scan(example(("T1", 1.0), 6), volume=torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"shapes: \[\(1, 2, 2, 2\), \(1, 3, 3, 3\)\]"):
        collator([example(("T1", 1.0), 6), wrong])


def test_arguments_when_invalid_are_rejected():
    with pytest.raises(ValueError, match="modality_order"):
        PaddingCollator(pad_token_id=PAD, modality_order=["T1", "T1"])
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        PaddingCollator(pad_token_id=None, modality_order=["T1"])
    with pytest.raises(ValueError, match="padding_side"):
        PaddingCollator(pad_token_id=PAD, modality_order=["T1"], padding_side="middle")
    with pytest.raises(ValueError, match="empty"):
        PaddingCollator(pad_token_id=PAD, modality_order=["T1"])([])
