"""The `data` section: manifests or the synthetic cohort, their mixing, and the pipeline of each modality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from umbrella_data.pipeline.config import PipelineSettings
from umbrella_train.config.section import AbsolutePath, ModalityName, Section, UniqueNames

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
    """Where to write it (default: in output_dir); a complete cohort is reused."""


class DataConfig(Section):
    """What to train and evaluate on."""

    train: list[DatasetConfig] = Field(default_factory=list)
    """Manifests to train on, interleaved."""
    evaluation: list[DatasetConfig] = Field(default_factory=list)
    """Manifests of held-out subjects."""
    allow_overlap: bool = False
    """Train although a subject or a file's content is in both; the report then says that scores are not held out."""
    synthetic: SyntheticConfig | None = None
    """The demo cohort instead of manifests."""
    num_folds: Annotated[int, Field(ge=2)] | None = None
    """Split train by subject, stratified by answers, into this many folds; umbrella-train with folds sets it."""
    fold: PositiveInt | None = None
    """The fold, from 1, that the run is evaluated on instead of evaluation; it trains on the others."""
    calibration_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training subjects that is not trained on, to fit the temperature of probabilities."""
    mixing: Literal["proportional", "equal", "temperature", "weights"] = "proportional"
    """proportional: every sample exactly once per epoch; equal: equally many from each; temperature: between the two;
    weights: by their weights."""
    temperature: PositiveFloat | None = None
    """For temperature mixing: 1 is proportional, large values are nearly equal."""
    stop: Literal["all", "first"] = "all"
    """An epoch ends when all manifests are exhausted (small ones repeat), or when the first one is."""
    batches: Literal["by_modality", "mixed", "by_length"] = "by_modality"
    """by_modality: the samples of a batch hold the same modalities; mixed: any; by_length: any, of similar length."""
    max_tokens_per_batch: PositiveInt | None = None
    """Tokens of a training batch, including image tokens and padding; replaces per_device_train_batch_size."""
    packing: bool = False
    """Concatenate the conversations of a batch in one row, without padding; none attends to another."""
    on_bad_scan: Literal["raise", "skip"] = "raise"
    """skip: replace a sample whose scan is unusable by one of the same modalities; these are counted and listed."""
    max_bad_fraction: float = Field(default=DEFAULT_BAD_FRACTION, ge=0, le=1)
    """With skip: the run stops when more than this fraction of a manifest's samples is unusable."""
    max_length: PositiveInt | None = None
    """Longest sample in tokens; longer ones lose whole turns, the oldest first."""
    number_decimals: Annotated[int, Field(ge=0, le=9)] | None = None
    """Decimals of the numbers to learn, in answers of type number; 0: whole numbers (default: as in the rows)."""
    number_smoothing: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """By task: standard deviation, in the unit of the answer, of the numbers to learn, drawn again in every epoch."""
    cache_dir: AbsolutePath | None = None
    """Folder of preprocessed volumes (default: no cache)."""
    index_dir: AbsolutePath | None = None
    """Folder of gzip indexes, for fast windows of long .nii.gz series without a cache (default: none)."""
    pipelines: Annotated[dict[ModalityName, PipelineSettings], UniqueNames] = Field(default_factory=dict)
    """Pipeline by modality, where it differs from the defaults."""

    @field_validator("synthetic")
    @classmethod
    def _check_there_is_one_source(
        cls, synthetic: SyntheticConfig | None, info: ValidationInfo
    ) -> SyntheticConfig | None:
        given = [name for name in ("train", "evaluation") if info.data.get(name)]
        if synthetic is not None and given:
            raise ValueError(f"cannot be combined with {' and '.join(given)}; remove one of them")
        if synthetic is None and info.data.get("train") == []:
            raise ValueError("there is nothing to train on: give train (manifests) or synthetic")
        return synthetic

    @field_validator("fold")
    @classmethod
    def _check_fold_is_one_of_the_folds(cls, fold: int | None, info: ValidationInfo) -> int | None:
        if "num_folds" not in info.data:
            return fold
        num_folds: int | None = info.data["num_folds"]
        if (fold is None) != (num_folds is None):
            raise ValueError(
                f"is {fold} with num_folds {num_folds}: set both or neither, or use umbrella-train --folds"
            )
        if fold is not None and num_folds is not None and fold > num_folds:
            raise ValueError(f"is {fold}, but num_folds is {num_folds}")
        return fold

    @field_validator("mixing")
    @classmethod
    def _check_weights_are_used(cls, mixing: str, info: ValidationInfo) -> str:
        weights = [f"train.{i}.weight" for i, each in enumerate(info.data.get("train", [])) if each.weight != 1]
        if weights and mixing != "weights":
            raise ValueError(f"{mixing} does not use {', '.join(weights)}; set mixing to weights, or remove them")
        return mixing

    @field_validator("temperature")
    @classmethod
    def _check_temperature_is_used(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        mixing = info.data.get("mixing")
        if mixing is not None and (temperature is not None) != (mixing == "temperature"):
            raise ValueError(f"is {temperature} with mixing {mixing}: set both or neither")
        return temperature

    @field_validator("max_bad_fraction")
    @classmethod
    def _check_fraction_is_used(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction != DEFAULT_BAD_FRACTION and info.data.get("on_bad_scan") == "raise":
            raise ValueError("would not be used: on_bad_scan is raise")
        return fraction

    @field_validator("index_dir")
    @classmethod
    def _check_index_is_used(cls, index_dir: Path | None, info: ValidationInfo) -> Path | None:
        if index_dir is not None and info.data.get("cache_dir") is not None:
            raise ValueError("would not be used: cache_dir is set")
        return index_dir
