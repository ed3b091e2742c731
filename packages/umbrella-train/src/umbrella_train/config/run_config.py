"""`RunConfig`: the whole configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, ValidationError, ValidationInfo, field_validator

from umbrella_data.pipeline.config import PipelineConfig
from umbrella_train.config.data import DataConfig
from umbrella_train.config.model import ModelConfig
from umbrella_train.config.section import AbsolutePath, Section, errors_at
from umbrella_train.config.training import DummyLossConfig, ReportConfig, TrainerConfig


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
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
        return (synthetic and synthetic.directory) or self.output_dir / "synthetic-cohort"
