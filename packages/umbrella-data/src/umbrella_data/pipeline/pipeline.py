"""The pipeline of each modality, from files to the tensor that the model sees.

    file  -> read_resampled         frames (T, 1, *image_size[:3]), RAS+; a volume is one frame
          -> _frames_at             with window_seconds: interpolated to the repetition time of the model's frames
    files -> load_volume, fit_dwi   (C, X, Y, Z), RAS+, the scan's own grid: ready maps, or maps fitted to a DWI
          -> resample               frames (1, C, *image_size)
          -> normalise              z-scores of the foreground
          -> augment                in training only, from the sample's generator
          -> (C, *image_size)

The result of the steps before the random ones (window of a series, augmentation) can be stored in a `VolumeCache`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from umbrella_data.cache.entry import CachedFrames
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.paths import both_files
from umbrella_data.modality import find_modality
from umbrella_data.pipeline.augment import Augmentation
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.crop import box_centre
from umbrella_data.pipeline.frame_times import check_window_seconds, frame_positions
from umbrella_data.pipeline.normalise import NoContrastError, normalise
from umbrella_data.pipeline.resample import Centre, Grid, resample
from umbrella_data.pipeline.streaming import read_resampled, warn_of_zeroed
from umbrella_data.scan.gzip_index import check_indexed_gzip
from umbrella_data.scan.header import ScanHeader, ScanWarning
from umbrella_data.scan.reader import StoredScan, open_scan
from umbrella_data.scan.volume import load_volume
from umbrella_data.scan.voxels import MAX_SERIES_VOXELS, MAX_VOXELS, check_rank

ScanFiles = str | PathLike[str] | Sequence[str | PathLike[str]]
"""The file of a scan, or its files in the order of the channels."""

PIPELINE_VERSION = 5
"""Incremented whenever the same files and config would give other voxels, so that old caches are not used."""


class _Files(NamedTuple):
    """The files of one scan."""

    paths: tuple[Path, ...]
    mask: Path | None


class Pipeline:
    """Converts the files of one scan to the tensor that the model sees. Can be pickled for loader workers.

    Args:
        config: The preprocessing.
        modality: A name or an alias.
        cache: Cache of preprocessed volumes; None computes them each time.
        index_folder: Folder of gzip indexes of long `.nii.gz` series, for windows without a cache.

    Attributes:
        spec: The modality.

    Raises:
        ValueError: If the config does not fit the modality.
        ImportError: If there is an index folder and `indexed_gzip` is not installed.
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
        if index_folder is not None:
            check_indexed_gzip()
        self._is_series, self._num_channels = self.spec.is_series, self.spec.num_channels
        if len(config.image_size) != self.spec.spatial_rank:
            axes = "(X, Y, Z, T)" if self._is_series else "(X, Y, Z)"
            raise ValueError(f"{self.spec.name} needs an image_size {axes}, not {config.image_size}")
        if config.normalise == "temporal_zscore" and not self._is_series:
            raise ValueError(f"normalise: temporal_zscore is for series; {self.spec.name} has no frames")
        if config.window_seconds is not None:
            if not self._is_series:
                raise ValueError(f"window_seconds: is for series; {self.spec.name} has no frames")
            check_window_seconds(config.window_seconds, num_frames=config.image_size[3])
        for key in ("max_b", "b0_threshold"):
            if getattr(config, key) != PipelineConfig.model_fields[key].default and self._num_channels == 1:
                raise ValueError(f"{key}: is for the tensor of a DWI; {self.spec.name} is not diffusion-weighted")
        x, y, z = config.image_size[:3]
        self.grid = Grid(image_size=(x, y, z), spacing=config.spacing, interpolation=config.interpolation)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything except the files that determines the cached voxels."""
        facts = {
            "version": PIPELINE_VERSION,
            "modality": self.spec.name,
            "image_size": self.config.image_size[:3],
            "spacing": self.config.spacing,
            "interpolation": self.config.interpolation,
            # A series is normalised after its window is drawn.
            "normalise": None if self._is_series else self.config.normalise,
        }
        if self._num_channels > 1:
            facts |= {"max_b": self.config.max_b, "b0_threshold": self.config.b0_threshold}
        if self.config.crop != "field_of_view":
            facts["crop"] = self.config.crop
        if self.config.non_finite != "outside_mask":  # caches that were filled before this key existed stay valid
            facts["non_finite"] = self.config.non_finite
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def augmentation(self) -> Augmentation | None:
        """The random transforms, if there are any. The first access imports MONAI: do it before workers are forked.

        Raises:
            ValueError: If MONAI rejects a combination of arguments.
        """
        if self.config.augment is None:
            return None
        return Augmentation(self.config.augment, image_size=self.grid.image_size)

    def __call__(
        self, paths: ScanFiles, *, generator: torch.Generator | None, mask: str | PathLike[str] | None = None
    ) -> torch.Tensor:
        """Preprocess one scan.

        Args:
            paths: The file or files.
            generator: The sample's own random generator in training; None takes the middle of a series and does not
                augment.
            mask: The scan's brain mask: voxels outside are set to 0 before normalisation, and the foreground is inside.

        Returns:
            (C, *image_size) float32; float16 for a volume from the cache that is not augmented.

        Raises:
            ScanError: If a file is damaged or inconsistent, or a series is too short, or, with `window_seconds`, if its
                repetition time is unknown.
        """
        scan = _files_of(paths, mask)
        augmentation = None if generator is None else self.augmentation
        frames = self._window(scan, generator) if self._is_series else self._whole(scan, as_stored=augmentation is None)
        if generator is not None and augmentation is not None:
            frames = augmentation(frames, generator=generator)
        if self._is_series:
            return frames.permute(1, 2, 3, 4, 0).contiguous()
        return frames[0]

    def warm(self, paths: ScanFiles, *, mask: str | PathLike[str] | None = None) -> None:
        """Add a scan to the cache, if it is missing there."""
        if self.cache is not None:
            self._entry(_files_of(paths, mask), self.cache)

    def is_cached(self, paths: ScanFiles, *, mask: str | PathLike[str] | None = None) -> bool:
        """Whether a scan is in the cache; nothing is computed.

        Raises:
            ScanError: If a file cannot be read.
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
            # Half the bytes to read and to copy to the device; the model converts to its own dtype.
            return entry.read_stored()
        return entry.read(0, 1)

    def _window(self, scan: _Files, generator: torch.Generator | None) -> torch.Tensor:
        """The normalised window (T, C, X, Y, Z) of a series."""
        path = scan.paths[0]
        if self.cache is None:
            with open_scan(path, index_folder=self.index_folder) as stored:
                check_rank(stored.header, rank=4, path=stored.path)
                positions = self._positions(path, stored.header)
                window = self._draw_window(stored.header.num_frames, positions, generator, path=path)
                frames = self._resampled(stored, mask=scan.mask, window=window)
        else:
            entry = self._entry(scan, self.cache)
            positions = self._positions(path)
            first, count = self._draw_window(entry.num_frames, positions, generator, path=path)
            frames = entry.read(first, count)
        return self._normalised(_frames_at(frames, positions), scan)

    def _positions(self, path: Path, header: ScanHeader | None = None) -> np.ndarray:
        """Where the T frames of the window are, in frames of the file from the first one: (T,) float64."""
        length, seconds = self.config.image_size[3], self.config.window_seconds
        if seconds is None:
            return np.arange(length, dtype=np.float64)
        return frame_positions(path, window_seconds=seconds, num_frames=length, header=header)

    def _draw_window(
        self, num_frames: int, positions: np.ndarray, generator: torch.Generator | None, *, path: Path
    ) -> tuple[int, int]:
        """First frame and number of frames to read, so that all positions (T,) are between frames."""
        length = int(np.ceil(positions[-1])) + 1
        if num_frames < length:
            if self.config.short_series == "pad":
                return 0, num_frames
            key, more = "image_size", ""
            if self.config.window_seconds is not None:
                span = self.config.window_seconds * (len(positions) - 1) / len(positions)
                own = span * (num_frames - 1) / positions[-1]
                key, more = "window_seconds", f" ({span:g} s from the first to the last one; the series has {own:g} s)"
            raise ScanError(
                f"{num_frames} frames, but {key} needs {length}{more}: lower {key}, or set short_series: pad",
                path=path,
                reason=ScanReason.SHORT_SERIES,
            )
        spare = num_frames - length
        if generator is None:
            return spare // 2, length
        return int(torch.randint(spare + 1, (1,), generator=generator)), length

    def _prepare(self, scan: _Files) -> torch.Tensor:
        """The frames (T, C, X, Y, Z) that are cached: all of a series, not normalised; a volume's are normalised."""
        paths, mask = scan
        if len(paths) == 1 and self._num_channels == 1:
            with open_scan(paths[0]) as stored:
                frames = self._resampled(stored, mask=mask)
            return frames if self._is_series else self._normalised(frames, scan)
        settings = self.config
        if len(paths) == 1:
            from umbrella_data.scan.diffusion import fit_dwi  # lazy: dipy is an extra

            maps = fit_dwi(
                paths[0],
                mask=mask,
                max_b=settings.max_b,
                b0_threshold=settings.b0_threshold,
                non_finite=settings.non_finite,
            )
            data, spacing, warnings = torch.from_numpy(np.stack([maps.fa, maps.md])), maps.spacing, maps.warnings
        else:
            volume = load_volume(paths, modality=self.spec.name, mask=mask, non_finite=settings.non_finite)
            data, spacing, warnings = volume.data, volume.spacing, volume.warnings
        if ScanWarning.NON_FINITE in warnings:
            warn_of_zeroed()
        frames = resample(
            data[None],
            spacing=spacing,
            grid=self.grid,
            is_masked=self._is_masked(mask),
            centre=self._centre(scan, data[None].numpy()),
        )
        return self._normalised(frames, scan)

    def _resampled(
        self, stored: StoredScan, *, mask: Path | None, window: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Frames (T, 1, X, Y, Z) of one file."""
        is_for_cache = self.cache is not None and self._is_series
        frames = read_resampled(
            stored,
            rank=self.spec.spatial_rank,
            grid=self.grid,
            window=window,
            max_voxels=MAX_SERIES_VOXELS if is_for_cache else MAX_VOXELS,
            mask=mask,
            is_masked=self._is_masked(mask),
            non_finite=self.config.non_finite,
            centre=self._centre(_Files((Path(stored.path),), mask)),
            folder=self.cache.directory if self.cache is not None else None,
        )
        return torch.from_numpy(frames)[:, None]

    def _centre(self, scan: _Files, values: np.ndarray | None = None) -> Centre:
        if self.config.crop == "field_of_view":
            return None
        return box_centre(scan.paths, mask=scan.mask, spec=self.spec, config=self.config, values=values)

    def _normalised(self, frames: torch.Tensor, scan: _Files) -> torch.Tensor:
        try:
            return normalise(frames, method=self.config.normalise, is_masked=self._is_masked(scan.mask))
        except NoContrastError as error:
            raise ScanError(str(error), path=scan.paths[0], reason=ScanReason.CONSTANT) from error

    def _is_masked(self, mask: Path | None) -> bool:
        """Whether the background is exactly 0, which determines the foreground and values outside the field of view."""
        return self.spec.is_masked or mask is not None

    def _sources(self, scan: _Files) -> list[Path]:
        """Every file that determines the voxels."""
        more = [] if scan.mask is None else [scan.mask]
        if self._num_channels > 1 and len(scan.paths) == 1:
            from umbrella_data.scan.gradient_table import gradient_files

            more += gradient_files(scan.paths[0])
        return [file for path in (*scan.paths, *more) for file in both_files(path)]


def _files_of(paths: ScanFiles, mask: str | PathLike[str] | None) -> _Files:
    # A str is a sequence of characters.
    listed = [paths] if isinstance(paths, str | PathLike) else paths
    return _Files(tuple(map(Path, listed)), None if mask is None else Path(mask))


def _frames_at(frames: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Frames (N, ...) at positions (T,), linearly interpolated; N frames repeat backwards, then forwards, and so on."""
    count = frames.shape[0]
    if np.array_equal(positions, np.arange(count)):
        return frames
    period = np.concatenate([np.arange(count), np.arange(count - 2, 0, -1)])
    before = np.floor(positions).astype(np.int64)
    result = frames[torch.from_numpy(period[before % len(period)])]
    weights = torch.from_numpy(positions - before).to(frames.dtype)
    if weights.any():
        after = frames[torch.from_numpy(period[(before + 1) % len(period)])]
        result = result.lerp(after, weights.view(-1, *[1] * (frames.ndim - 1)))
    return result
