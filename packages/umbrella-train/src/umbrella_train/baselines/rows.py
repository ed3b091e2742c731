"""Rows of manifests with the features of their scans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umbrella_data import ConversationDataset, ScanError
from umbrella_data.batch.example import ScanPipeline
from umbrella_data.manifest.sample import Answer, Sample, Scan
from umbrella_train.baselines.features import (
    StoredVolume,
    VolumeFile,
    count_intensities,
    shrink,
    shrink_for_cnn,
    spatial_maps,
)
from umbrella_train.baselines.regions import Segmentations, region_volumes


@dataclass(frozen=True)
class ScanFeatures:
    """Features of one scan.

    Attributes:
        volume: As from `shrink`, flat: (F,) float32.
        counts: As from `count_intensities`, (C, `NUM_STEPS`) int32.
        stored: The volume for the CNN.
        regions: Volume in mm3 of each region; None without a segmentation.
    """

    volume: np.ndarray
    counts: np.ndarray
    stored: StoredVolume
    regions: Mapping[int, float] | None


@dataclass(frozen=True)
class Row:
    """A row with an answer.

    Attributes:
        sample: The row of the manifest.
        answer: Its answer.
        scans: Features of its scans in reading order.
    """

    sample: Sample
    answer: Answer
    scans: tuple[ScanFeatures, ...]

    @property
    def text(self) -> str:
        """All texts of the prompt, which is the conversation without its last turn if that is the assistant's."""
        messages = self.sample.messages
        return "\n".join(turn.text for turn in (messages[:-1] if messages[-1].role == "assistant" else messages))


class FeatureReader:
    """Reads the features of scans, each scan once.

    Args:
        pipelines: The run's pipelines by modality.
        segmentations: Where to find segmentations.
    """

    def __init__(self, pipelines: Mapping[str, ScanPipeline], *, segmentations: Segmentations | None = None) -> None:
        self.volumes = VolumeFile()
        self._pipelines = pipelines
        self._segmentations = segmentations
        self._scans: dict[Scan, ScanFeatures] = {}
        self._regions: dict[Path, dict[int, float]] = {}

    def rows(self, dataset: ConversationDataset, indices: Iterable[int]) -> Iterator[Row]:
        """The rows of a data set that have an answer and usable scans.

        Raises:
            ScanError: A scan is unusable, and the data set does not skip such rows.
            TooManyBadScansError: More scans than allowed are unusable.
        """
        for index in indices:
            sample = dataset.sample(index)
            if sample.answer is None:
                continue
            try:
                scans = tuple(self.features(scan, subject=sample.subject) for scan in sample.scans)
            except ScanError as error:
                dataset.leave_out(index, error)
                continue
            yield Row(sample, sample.answer, scans)

    def features(self, scan: Scan, *, subject: str) -> ScanFeatures:
        """The features of a scan of a subject.

        Raises:
            ScanError: The scan, or its segmentation, is unusable.
        """
        if scan not in self._scans:
            mask = {} if scan.mask is None else {"mask": scan.mask}
            volume = self._pipelines[scan.modality](scan.paths, generator=None, **mask)
            maps = spatial_maps(volume)
            self._scans[scan] = ScanFeatures(
                volume=shrink(maps).flatten().numpy(),
                counts=count_intensities(volume).astype(np.int32),
                stored=self.volumes.add(shrink_for_cnn(maps)),
                regions=self._region_volumes(scan, subject=subject),
            )
        return self._scans[scan]

    def _region_volumes(self, scan: Scan, *, subject: str) -> Mapping[int, float] | None:
        path = None if self._segmentations is None else self._segmentations.find(scan, subject=subject)
        if path is None:
            return None
        if path not in self._regions:
            self._regions[path] = region_volumes(path)
        return self._regions[path]
