"""Whether the scans of manifests have brain masks, and a warning where they differ from those of training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from umbrella_train.assembly.masks import answers_start_with_reasoning, masked_modalities, warn_of_other_masks
from umbrella_train.config import DatasetConfig


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """Writes a manifest with a row for each pair of modality and whether it has a mask."""

    def make(name: str, *scans: tuple[str, bool]) -> DatasetConfig:
        rows = []
        for number, (modality, has_mask) in enumerate(scans):
            image = {
                "type": "image",
                "modality": modality,
                "path": f"{number}.nii",
                "mask": "m.nii" if has_mask else None,
            }
            messages = [{"role": "user", "content": [image]}]
            rows.append({"id": str(number), "subject": "s", "messages": messages})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DatasetConfig(manifest=tmp_path / name)

    return make


def test_modalities_that_mix_scans_with_and_without_masks_are_left_out(write: Callable[..., DatasetConfig]) -> None:
    one = write("one.jsonl", ("T1", True), ("rsfMRI", False), ("T1", True))
    other = write("other.jsonl", ("rsfMRI", True), ("dMRI", False))
    assert masked_modalities([one]) == {"T1": True, "rsfMRI": False}
    assert masked_modalities([one, other]) == {"T1": True, "dMRI": False}


def test_each_modality_that_differs_is_one_warning(
    write: Callable[..., DatasetConfig], caplog: pytest.LogCaptureFixture
) -> None:
    source = write("one.jsonl", ("T1", True), ("rsfMRI", False), ("dMRI", True))
    with caplog.at_level(logging.WARNING):
        warn_of_other_masks([source], trained={"T1": False, "rsfMRI": True, "dMRI": True})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["T1", "rsfMRI"]


def test_answers_start_with_reasoning_only_if_all_do(write: Callable[..., DatasetConfig]) -> None:
    source = write("one.jsonl", ("T1", True), ("T1", True))
    rows = [json.loads(line) for line in source.manifest.read_text().splitlines()]
    for texts, expected in (
        (("<think>\nwide\n</think>\n\n41", "<think>x</think>7"), True),
        (("41", "<think>x</think>7"), False),
    ):
        for row, text in zip(rows, texts, strict=True):
            row["messages"] = [*row["messages"][:1], {"role": "assistant", "content": text}]
        source.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert answers_start_with_reasoning([source]) is expected
