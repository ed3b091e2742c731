"""`RunConfig`: everything that one run is made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, model_validator

from umbrella_train.config.data import AbsolutePath, DataConfig
from umbrella_train.config.model import ModelConfig
from umbrella_train.config.section import Problem, Section, SectionError
from umbrella_train.config.training import DummyLossConfig, ReportConfig, TrainerConfig


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run's folder; a name in use becomes NAME-2, NAME-3, ..."""
    output_dir: AbsolutePath = Field(default=Path("runs"), validate_default=True)
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

    @model_validator(mode="after")
    def _check_pipelines_have_models(self) -> RunConfig:
        problems = pipeline_problems(self.data.pipelines, modalities=self.model.modalities)
        if problems:
            raise SectionError(problems)
        return self


def pipeline_problems(pipelines: Iterable[str], *, modalities: Iterable[str]) -> list[Problem]:
    """Name the pipelines of modalities that the model does not have.

    Args:
        pipelines: Canonical names of the modalities that have one.
        modalities: Canonical names of the model's modalities.
    """
    known = list(modalities)
    return [
        Problem(f"data.pipelines.{name}", f"model.modalities has no {name} (it has {', '.join(known)})")
        for name in pipelines
        if name not in known
    ]
