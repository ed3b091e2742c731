"""Rows with a random volume, built without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn
from umbrella_train.baselines.features import VolumeFile, count_intensities, shrink, shrink_for_cnn
from umbrella_train.baselines.rows import Row, ScanFeatures

SIDES = ("left", "right")


@pytest.fixture
def volumes() -> VolumeFile:
    return VolumeFile()


@pytest.fixture
def make_row(volumes: VolumeFile) -> Callable[..., Row]:
    """A row of a subject, with a random volume (1, 8, 8, 8) and a signal added to one corner."""

    def make(
        number: int,
        answer: Answer,
        *,
        signal: float = 0.0,
        question: str = "Which one?",
        task: str = "task",
        num_scans: int = 1,
        regions: Mapping[int, float] | None = None,
        subject: str | None = None,
    ) -> Row:
        generator = torch.Generator().manual_seed(number)
        volume = torch.randn(1, 8, 8, 8, generator=generator)
        volume[:, :4, :4, :4] += signal
        features = ScanFeatures(
            shrink(volume).flatten().numpy(), count_intensities(volume), volumes.add(shrink_for_cnn(volume)), regions
        )
        scan = Scan("T1", (Path(f"{number}.nii.gz"),))
        turns = (
            Turn("user", (*[scan] * num_scans, question)),
            Turn("assistant", (f"The answer is {answer.value}.",)),
        )
        name = subject or f"sub-{number:03}"
        return Row(Sample(f"{name}_{task}", name, task, turns, answer), answer, (features,) * num_scans)

    return make


@pytest.fixture
def side() -> Callable[[int], Answer]:
    """The answer to a question about one of two sides."""
    return lambda index: Answer("choice", SIDES[index], SIDES)
