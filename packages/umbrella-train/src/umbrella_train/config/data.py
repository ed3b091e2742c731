"""The `data` section: manifests or the synthetic cohort, how they are mixed, and each modality's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from umbrella_train.config.model import by_canonical_name
from umbrella_train.config.section import Problem, Section, SectionError

# Relative to the current directory, as on the command line; absolute from here on, so that a run folder's copy is true.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]

DEFAULT_BAD_FRACTION = 0.01


class DatasetConfig(Section):
    """One manifest."""

    manifest: AbsolutePath
    """A manifest (JSON Lines); relative to the current directory."""
    data_root: AbsolutePath | None = None
    """The folder that the manifest's paths are relative to (default: the manifest's own)."""
    weight: PositiveFloat = 1.0
    """Share in the mixture, with mixing weights."""


class SyntheticConfig(Section):
    """The demo cohort: brain-like phantoms with known answers, written as NIfTI files."""

    num_train: PositiveInt = 300
    """Subjects to train on, each with a scan of every modality."""
    num_test: PositiveInt = 64
    """Held-out subjects."""
    seed: NonNegativeInt = 0
    """Seed of the cohort."""
    directory: AbsolutePath | None = None
    """Where to write it (default: a folder beside the runs); a finished cohort is used again."""


class AugmentSettings(Section):
    """Random changes of a training scan, drawn from the sample's own generator."""

    flip_left_right: bool = False
    """Mirror every second scan: only where the answer does not depend on the side."""
    max_shift: float = Field(default=0.03, ge=0, le=0.25)
    """Largest shift along each axis, as a fraction of the field of view."""
    max_rotation: float = Field(default=5.0, ge=0, le=45)
    """Largest turn around each axis, in degrees."""
    max_intensity_scale: float = Field(default=0.1, ge=0, lt=1)
    """Largest relative change of contrast."""
    noise_std: NonNegativeFloat = 0.05
    """Standard deviation of Gaussian noise, in units of the normalised scan."""


class PipelineSettings(Section):
    """How scans of one modality become the model's input; the image size is the model's."""

    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Voxel size in mm to resample to, then crop or pad (default: the whole field of view, resized)."""
    interpolation: Literal["trilinear", "area"] = "trilinear"
    """How the field of view is resized: trilinear, or area, where a new voxel is the mean of those that it covers."""
    normalise: Literal["foreground_zscore", "temporal_zscore", "zscore", "nonzero_zscore"] = "foreground_zscore"
    """Over which voxels: foreground_zscore, zscore (all), nonzero_zscore; temporal_zscore: each one over time."""
    short_series: Literal["raise", "pad"] = "raise"
    """What to do with a series shorter than the window of frames."""
    augment: AugmentSettings | None = None
    """Augmentation of training scans (default: none)."""


class DataConfig(Section):
    """What to train and evaluate on."""

    train: list[DatasetConfig] = Field(default_factory=list)
    """Manifests to train on, interleaved."""
    evaluation: list[DatasetConfig] = Field(default_factory=list)
    """Manifests of held-out subjects."""
    synthetic: SyntheticConfig | None = None
    """The demo cohort instead of manifests."""
    mixing: Literal["proportional", "equal", "temperature", "weights"] = "proportional"
    """proportional: every sample exactly once an epoch; equal: as often from each; temperature: between the two;
    weights: as their weights say."""
    temperature: PositiveFloat | None = None
    """For temperature mixing: 1 is proportional, large ones near equal."""
    stop: Literal["all", "first"] = "all"
    """An epoch ends when all manifests are exhausted (small ones repeat), or when the first one is."""
    batches: Literal["by_modality", "mixed", "by_length"] = "by_modality"
    """by_modality: the samples of a batch hold the same modalities; mixed: any; by_length: any, of like length."""
    max_tokens_per_batch: PositiveInt | None = None
    """Tokens of a training batch, image tokens and padding (if any) counted; replaces per_device_train_batch_size."""
    packing: bool = False
    """Lay the conversations of a batch end to end in one row, without padding; none attends to another."""
    on_bad_scan: Literal["raise", "skip"] = "raise"
    """skip: another sample of the same modalities stands in for one whose scan cannot be used; counted and listed."""
    max_bad_fraction: float = Field(default=DEFAULT_BAD_FRACTION, ge=0, le=1)
    """With skip: the run stops when more than this share of a manifest's samples cannot be used."""
    max_length: PositiveInt | None = None
    """Longest sample in tokens; whole turns are dropped from the front to meet it."""
    cache_dir: AbsolutePath | None = None
    """Folder of preprocessed volumes (default: no cache)."""
    index_dir: AbsolutePath | None = None
    """Folder of gzip indexes, for fast windows of long .nii.gz series without a cache (default: none)."""
    pipelines: dict[str, PipelineSettings] = Field(default_factory=dict)
    """Pipeline by modality, where it departs from the defaults."""

    @field_validator("pipelines", mode="after")
    @classmethod
    def _check_pipelines(cls, pipelines: dict[str, PipelineSettings]) -> dict[str, PipelineSettings]:
        return by_canonical_name(pipelines)

    @property
    def mixing_weights(self) -> Literal["proportional", "equal", "temperature"] | list[float]:
        """The mixing as `InterleaveDataset` takes it."""
        return [dataset.weight for dataset in self.train] if self.mixing == "weights" else self.mixing

    @model_validator(mode="after")
    def _check_combinations(self) -> DataConfig:
        problems = [
            Problem(f"train.{position}.weight", f"would not be used: mixing is {self.mixing}", ("mixing",))
            for position, dataset in enumerate(self.train)
            if dataset.weight != 1 and self.mixing != "weights"
        ]
        if (self.temperature is not None) != (self.mixing == "temperature"):
            message = f"is {self.temperature} with mixing {self.mixing}: the two belong together"
            problems.append(Problem("temperature", message, ("mixing",)))
        if self.max_bad_fraction != DEFAULT_BAD_FRACTION and self.on_bad_scan == "raise":
            message = "would not be used: on_bad_scan is raise"
            problems.append(Problem("max_bad_fraction", message, ("on_bad_scan",)))
        if self.index_dir is not None and self.cache_dir is not None:
            problems.append(Problem("index_dir", "would not be used: cache_dir is set", ("cache_dir",)))
        if self.synthetic is None and not self.train:
            message = "names nothing to train on: give train (manifests) or synthetic"
            problems.append(Problem("", message, ("train", "synthetic")))
        if self.synthetic is not None:
            both = [name for name in ("train", "evaluation") if getattr(self, name)]
            problems += [Problem(name, "cannot stand beside synthetic", ()) for name in both]
        if problems:
            raise SectionError(problems)
        return self
