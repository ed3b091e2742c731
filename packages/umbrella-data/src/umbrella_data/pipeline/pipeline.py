"""The pipeline of each modality, from files to the tensor that the model sees.

    file  -> read_resampled       frames (T, 1, *image_size[:3]), RAS+; a volume is one frame
    files -> load_volume          (C, X, Y, Z), RAS+, the scan's own grid: maps, or a DWI to fit them to
          -> resample             frames (1, C, *image_size)
          -> normalise            a z-score over the foreground
          -> augment              in training only, from the sample's generator
          -> (C, *image_size)

What comes before chance (the window of a series, augmentation) can be kept in a `VolumeCache`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from umbrella_data.cache.entry import CachedFrames
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.naming import pair_of
from umbrella_data.memory.batch_buffer import next_place
from umbrella_data.modality import find_modality
from umbrella_data.pipeline.augment import augment
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.normalise import NoContrastError, normalise
from umbrella_data.pipeline.resample import Grid, resample
from umbrella_data.pipeline.streaming import read_resampled
from umbrella_data.scan.reader import StoredScan, open_scan
from umbrella_data.scan.volume import load_volume
from umbrella_data.scan.voxels import MAX_SERIES_VOXELS, MAX_VOXELS, check_rank

ScanFiles = str | PathLike[str] | Sequence[str | PathLike[str]]
"""The file of a scan, or its files in the order of the channels."""

PIPELINE_VERSION = 5
"""Raised whenever the same files and config would give other voxels, so that old caches are not used."""


class _Files(NamedTuple):
    """The files of one scan."""

    paths: tuple[Path, ...]
    mask: Path | None


class Pipeline:
    """Turns the files of one scan into the tensor that the model sees. Can be pickled for loader workers.

    Args:
        config: What to do.
        modality: A name or an alias.
        cache: Where preprocessed volumes are kept; None computes them each time.
        index_folder: Where access points into long `.nii.gz` series are kept, for windows without a cache.

    Raises:
        ValueError: Where the config does not fit the modality.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        modality: str,
        cache: VolumeCache | None = None,
        index_folder: str | PathLike[str] | None = None,
    ) -> None:
        self.spec = find_modality(modality)
        self.config = config
        self.cache = cache
        self.index_folder = None if index_folder is None else Path(index_folder)
        if len(config.image_size) != self.spec.spatial_rank:
            axes = "(X, Y, Z, T)" if self.spec.is_series else "(X, Y, Z)"
            raise ValueError(f"{self.spec.name} needs an image_size {axes}; it is {config.image_size}")
        if config.normalise == "temporal_zscore" and not self.spec.is_series:
            raise ValueError(f"{self.spec.name} has no frames: normalise: temporal_zscore is for series")
        x, y, z = config.image_size[:3]
        self.grid = Grid(image_size=(x, y, z), spacing=config.spacing, interpolation=config.interpolation)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the cached voxels, but for the files."""
        facts = {
            "version": PIPELINE_VERSION,
            "modality": self.spec.name,
            "image_size": self.config.image_size[:3],
            "spacing": self.config.spacing,
            "interpolation": self.config.interpolation,
            # A series is normalised after its window was drawn.
            "normalise": None if self.spec.is_series else self.config.normalise,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(
        self, paths: ScanFiles, *, generator: torch.Generator | None, mask: str | PathLike[str] | None = None
    ) -> torch.Tensor:
        """Preprocess one scan.

        Args:
            paths: Its file or files.
            generator: The sample's own source of chance in training; None takes a series' middle and augments nothing.
            mask: Its brain mask: all outside is 0 before it is normalised, and the foreground is what lies inside.

        Returns:
            (C, *image_size) float32; float16 for a volume from the cache that is not augmented.

        Raises:
            ScanError: Where a file cannot be trusted, or the series is too short.
        """
        scan = _files_of(paths, mask)
        is_augmented = generator is not None and self.config.augment is not None
        frames = self._window(scan, generator) if self.spec.is_series else self._whole(scan, as_stored=not is_augmented)
        if generator is not None and self.config.augment is not None:
            frames = augment(frames, config=self.config.augment, generator=generator)
        if self.spec.is_series:
            return frames.permute(1, 2, 3, 4, 0).contiguous()
        return frames[0]

    def warm(self, paths: ScanFiles, *, mask: str | PathLike[str] | None = None) -> None:
        """Put a scan into the cache, if it is not there already."""
        if self.cache is not None:
            self._entry(_files_of(paths, mask), self.cache)

    def is_cached(self, paths: ScanFiles, *, mask: str | PathLike[str] | None = None) -> bool:
        """Whether a scan is in the cache as things stand; nothing is made.

        Raises:
            ScanError: Where a file cannot be read.
        """
        sources = self._sources(_files_of(paths, mask))
        return self.cache is not None and self.cache.holds(sources, fingerprint=self.fingerprint)

    def _entry(self, scan: _Files, cache: VolumeCache) -> CachedFrames:
        return cache.fetch(self._sources(scan), fingerprint=self.fingerprint, make=lambda: self._prepare(scan))

    def _whole(self, scan: _Files, *, as_stored: bool) -> torch.Tensor:
        """The prepared frame (1, C, X, Y, Z) of a volume."""
        if self.cache is None:
            return self._prepare(scan)
        entry = self._entry(scan, self.cache)
        if as_stored and not entry.is_scaled:
            # Half the bytes to read and to send to the device; the model casts to its own type.
            return entry.read_stored(next_place(self.spec.name, entry.shape[1:])[None])
        return entry.read(0, 1)

    def _window(self, scan: _Files, generator: torch.Generator | None) -> torch.Tensor:
        """The normalised window (T, C, X, Y, Z) of a series."""
        length = self.config.image_size[3]
        if self.cache is None:
            with open_scan(scan.paths[0], index_folder=self.index_folder) as stored:
                check_rank(stored.header, rank=4, path=stored.path)
                place = self._place(stored.header.num_frames, length, generator, path=scan.paths[0])
                frames = self._resampled(stored, mask=scan.mask, window=place)
        else:
            entry = self._entry(scan, self.cache)
            first, count = self._place(entry.num_frames, length, generator, path=scan.paths[0])
            frames = entry.read(first, count)
        return self._normalised(_back_and_forth(frames, length), scan)

    def _place(self, num_frames: int, length: int, generator: torch.Generator | None, *, path: Path) -> tuple[int, int]:
        """First frame and number of frames to read."""
        if num_frames < length:
            if self.config.short_series == "pad":
                return 0, num_frames
            raise ScanError(
                f"{num_frames} frames, but the model sees {length}: lower image_size, or set short_series: pad",
                path=path,
                reason=ScanReason.SHORT_SERIES,
            )
        spare = num_frames - length
        if generator is None:
            return spare // 2, length
        return int(torch.randint(spare + 1, (1,), generator=generator)), length

    def _prepare(self, scan: _Files) -> torch.Tensor:
        """What the cache keeps: frames (T, C, X, Y, Z), all of a series' and not normalised, a volume's ready."""
        if len(scan.paths) == 1 and self.spec.num_channels == 1:
            with open_scan(scan.paths[0]) as stored:
                frames = self._resampled(stored, mask=scan.mask)
        else:
            volume = load_volume(scan.paths, modality=self.spec.name, mask=scan.mask)
            frames = resample(
                volume.data[None], spacing=volume.spacing, grid=self.grid, is_masked=self._is_masked(scan.mask)
            )
        return frames if self.spec.is_series else self._normalised(frames, scan)

    def _resampled(
        self, stored: StoredScan, *, mask: Path | None, window: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Frames (T, 1, X, Y, Z) of one file."""
        is_for_cache = self.cache is not None and self.spec.is_series
        frames = read_resampled(
            stored,
            rank=self.spec.spatial_rank,
            grid=self.grid,
            window=window,
            max_voxels=MAX_SERIES_VOXELS if is_for_cache else MAX_VOXELS,
            mask=mask,
            is_masked=self._is_masked(mask),
            folder=self.cache.directory if self.cache is not None else None,
        )
        return torch.from_numpy(frames)[:, None]

    def _normalised(self, frames: torch.Tensor, scan: _Files) -> torch.Tensor:
        try:
            return normalise(frames, method=self.config.normalise, is_masked=self._is_masked(scan.mask))
        except NoContrastError as error:
            raise ScanError(str(error), path=scan.paths[0], reason=ScanReason.CONSTANT) from error

    def _is_masked(self, mask: Path | None) -> bool:
        """Whether the background is exactly 0: what tells the foreground, and what lies beyond the field of view."""
        return self.spec.is_masked or mask is not None

    def _sources(self, scan: _Files) -> list[Path]:
        """Every file that decides the voxels."""
        beside = [] if scan.mask is None else [scan.mask]
        if self.spec.num_channels > 1 and len(scan.paths) == 1:
            from umbrella_data.scan.gradient_table import gradient_files

            beside += gradient_files(scan.paths[0])
        return [file for path in (*scan.paths, *beside) for file in _whole_scan(path)]


def _files_of(paths: ScanFiles, mask: str | PathLike[str] | None) -> _Files:
    # A str is a sequence too: of one path, not of its letters.
    listed = [paths] if isinstance(paths, str | PathLike) else paths
    return _Files(tuple(map(Path, listed)), None if mask is None else Path(mask))


def _whole_scan(path: Path) -> tuple[Path, ...]:
    """Both files of a pair, or the one of any other scan."""
    pair = pair_of(str(path))
    return (path,) if pair is None else (Path(pair[0]), Path(pair[1]))


def _back_and_forth(frames: torch.Tensor, length: int) -> torch.Tensor:
    """Lengthen frames (T, ...) to `length` by playing them backwards, then forwards, and so on."""
    count = frames.shape[0]
    if count == length:
        return frames
    period = torch.cat([torch.arange(count), torch.arange(count - 2, 0, -1)])
    return frames[period.repeat(length // len(period) + 1)[:length]]
