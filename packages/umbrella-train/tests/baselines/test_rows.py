"""Rows with features: each scan is read once, and unusable ones are skipped or stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella_data import ScanError
from umbrella_data.errors import ScanReason
from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn
from umbrella_train.baselines.rows import FeatureReader

ANSWER = Answer("number", 1.0)
MASK = Path("mask.nii.gz")
ONE, TWO, BAD = (Scan("T1", (Path(f"{name}.nii.gz"),), mask=MASK) for name in ("one", "two", "bad"))


class Pipeline:
    """Returns the volume of a file, and lists what was read."""

    def __init__(self) -> None:
        self.read: list[tuple[str, Path | None]] = []

    def __call__(self, paths: Any, /, *, generator: torch.Generator | None, mask: Path | None = None) -> torch.Tensor:
        assert generator is None
        if paths == BAD.paths:
            raise ScanError("is damaged", path=paths[0], reason=ScanReason.UNREADABLE)
        self.read.append((paths[0].name, mask))
        return torch.full((1, 2, 2, 2), float(len(self.read)))


class DatasetOf:
    """A data set of samples that skips, or does not skip, unusable scans."""

    def __init__(self, samples: list[Sample], *, skips: bool = False) -> None:
        self.samples, self.skips, self.left_out = samples, skips, []

    def sample(self, index: int) -> Sample:
        return self.samples[index]

    def leave_out(self, index: int, error: ScanError) -> None:
        if not self.skips:
            raise error
        self.left_out.append(index)


def sample(*scans: Scan, answer: Answer | None = ANSWER, turns: tuple[Turn, ...] = ()) -> Sample:
    return Sample("id", "sub-1", "task", turns or (Turn("user", (*scans, "How much?")),), answer)


def test_each_scan_is_read_once_with_its_mask() -> None:
    pipeline = Pipeline()
    samples = [sample(ONE), sample(TWO, ONE), sample(ONE), sample(TWO, answer=None)]
    rows = list(FeatureReader({"T1": pipeline}).rows(DatasetOf(samples), range(4)))
    assert pipeline.read == [("one.nii.gz", MASK), ("two.nii.gz", MASK)]
    assert [[scan.volume[0] for scan in row.scans] for row in rows] == [[1], [2, 1], [1]]
    assert all(scan.regions is None for row in rows for scan in row.scans)


def test_rows_with_unusable_scans_are_skipped_if_the_run_skips_them() -> None:
    dataset = DatasetOf([sample(ONE, BAD), sample(ONE)], skips=True)
    rows = list(FeatureReader({"T1": Pipeline()}).rows(dataset, range(2)))
    assert (len(rows), dataset.left_out) == (1, [0])
    with pytest.raises(ScanError, match=r"bad\.nii\.gz"):
        list(FeatureReader({"T1": Pipeline()}).rows(DatasetOf(dataset.samples), range(2)))


def test_text_is_that_of_the_prompt() -> None:
    asked = (Turn("system", ("Be brief.",)), Turn("user", (ONE, "How much?", "Think.")))
    answered = (*asked, Turn("assistant", ("Two.",)), Turn("user", ("Sure?",)))
    reader = FeatureReader({"T1": Pipeline()})
    samples = [sample(turns=asked), sample(turns=(*asked, Turn("assistant", ("Two.",)))), sample(turns=answered)]
    texts = [row.text for row in reader.rows(DatasetOf(samples), range(3))]
    assert texts == ["Be brief.\nHow much?\nThink."] * 2 + ["Be brief.\nHow much?\nThink.\nTwo.\nSure?"]
