"""`RunConfig`: the whole configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from umbrella_data.pipeline.config import PipelineConfig
from umbrella_train.config.data import DataConfig
from umbrella_train.config.model import ModelConfig
from umbrella_train.config.section import AbsolutePath, Section, errors_at
from umbrella_train.config.training import DummyLossConfig, ReportConfig, TrainerConfig

COHORT_NAME = "synthetic-cohort"
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class StageConfig(Section):
    """One stage of a run: the keys that differ from the run's. `umbrella_train.config.stages` validates the whole."""

    name: FolderName
    """Name of the stage, and of its folder in the run's folder."""
    seed: NonNegativeInt | None = None
    """Seed (default: the run's)."""
    # Tables; the classes are the types of their keys on the command line.
    model: Annotated[ModelConfig | dict[str, Any], SkipValidation] = Field(default_factory=dict)
    """Keys of model."""
    data: Annotated[DataConfig | dict[str, Any], SkipValidation] = Field(default_factory=dict)
    """Keys of data."""
    dummy_loss: Annotated[DummyLossConfig | dict[str, Any], SkipValidation] = Field(default_factory=dict)
    """Keys of dummy_loss."""
    trainer: Annotated[TrainerConfig | dict[str, Any], SkipValidation] = Field(default_factory=dict)
    """Keys of trainer."""
    report: Annotated[ReportConfig | dict[str, Any], SkipValidation] = Field(default_factory=dict)
    """Keys of report."""


class RunConfig(Section):
    """One run, or several in stages."""

    name: FolderName = "run"
    """Name of the run's folder; a name in use becomes NAME-2, NAME-3, ..."""
    output_dir: AbsolutePath = Path("runs")
    """Folder of the runs' folders; relative to the current directory."""
    seed: NonNegativeInt = 0
    """Seed of the weights, the data order, augmentation and dropout."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """The data."""
    dummy_loss: DummyLossConfig = DummyLossConfig()
    """The dummy loss."""
    trainer: TrainerConfig = TrainerConfig()
    """The trainer."""
    report: ReportConfig = ReportConfig()
    """Evaluation and report."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Runs in turn, each from the model of the one before, with these changes of the keys above (default: one run)."""

    @field_validator("stages")
    @classmethod
    def _check_names(cls, stages: list[StageConfig]) -> list[StageConfig]:
        if problems := name_problems([stage.name for stage in stages]):
            raise errors_at(problems)
        return stages

    @model_serializer(mode="wrap")
    def _without_empty_stages(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        if not self.stages:
            content.pop("stages", None)
        return content

    @field_validator("data")
    @classmethod
    def _check_pipelines_have_models(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        model: ModelConfig | None = info.data.get("model")
        if model is None:
            return data
        problems = []
        for name, settings in data.pipelines.items():
            if name not in model.modalities:
                known = f"(it has {', '.join(model.modalities)})"
                problems.append((f"pipelines.{name}", f"model.modalities has no {name} {known}"))
                continue
            try:
                PipelineConfig(image_size=model.modalities[name].image_size, **dict(settings))
            except ValidationError as error:
                problems += [
                    (".".join(["pipelines", name, *map(str, each["loc"])]), each["msg"]) for each in error.errors()
                ]
        if problems:
            raise errors_at(problems)
        return data

    @property
    def pipeline_configs(self) -> dict[str, PipelineConfig]:
        """How the scans of each modality become the model's input."""
        settings = self.data.pipelines
        return {
            name: PipelineConfig(image_size=modality.image_size, **dict(settings.get(name, ())))
            for name, modality in self.model.modalities.items()
        }

    @property
    def cohort_directory(self) -> Path:
        """Folder of the demo cohort, for a run that uses it."""
        synthetic = self.data.synthetic
        return (synthetic and synthetic.directory) or self.output_dir / COHORT_NAME


def name_problems(names: Sequence[Any]) -> list[tuple[str, str]]:
    """Why names of stages cannot be those of folders in one folder, each with its place in `stages`."""
    problems = []
    # Folders on macOS and Windows do not distinguish capital letters.
    lower = [str(name).lower() for name in names]
    for number, name in enumerate(names):
        stem, _, end = lower[number].rpartition("-")
        place = f"{number}.name"
        if name is not None and lower[number] in lower[:number]:
            problems.append((place, f"{name} is also the name of stage {lower.index(lower[number])}; rename it"))
        elif end.isdecimal() and stem in lower:
            problems.append((place, f"{name} is the folder of a second run named {stem}; rename it"))
        elif end.isdecimal() and stem == "fold":
            problems.append((place, f"{name} is the folder of a fold of a cross-validation; rename it"))
    return problems
