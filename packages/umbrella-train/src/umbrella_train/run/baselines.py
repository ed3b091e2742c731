"""Baselines of a run: trained on its training manifests and tested on the rows that its model is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umbrella_data.progress import progress_bar
from umbrella_train.assembly.build import TrainingComponents
from umbrella_train.assembly.sources import check_manifests
from umbrella_train.baselines.compare import predict_baselines, summarise_baselines
from umbrella_train.baselines.regions import Segmentations
from umbrella_train.baselines.rows import FeatureReader, Row
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.errors import RunError
from umbrella_train.evaluation.controls import plan_questions
from umbrella_train.run_folder import RunFolder, write_lines


@dataclass(frozen=True)
class BaselineData:
    """What the baselines of a run need besides its model.

    Attributes:
        train: Manifests to train on.
        segmentations: Where region volumes come from; None leaves them out.
    """

    train: Sequence[DatasetConfig]
    segmentations: Segmentations | None


def find_baseline_data(
    train: Sequence[DatasetConfig], *, config: RunConfig, segmentations: Path | None
) -> BaselineData:
    """Check the data of the baselines before anything is computed.

    Args:
        train: The run's training manifests, or the parts of them that it trains on.
        config: The run.
        segmentations: A folder of BIDS derivatives with `*_dseg.nii.gz`.

    Raises:
        RunError: The run's training manifests are missing or invalid, or the segmentations, see `Segmentations`.
    """
    found = None if segmentations is None else Segmentations(segmentations)
    check_manifests(train or config.data.train, config=config)
    if not train:
        raise RunError("--baselines needs the run's training data, and its config.yaml has none, or they are not here")
    return BaselineData(train, found)


def evaluate_baselines(
    data: BaselineData,
    sources: Sequence[DatasetConfig],
    *,
    config: RunConfig,
    components: TrainingComponents,
    folder: RunFolder,
    device: torch.device,
    step: int | None,
) -> dict[str, float]:
    """Train the baselines, and score them on the questions that `evaluate_sources` asks the model.

    Args:
        data: From `find_baseline_data`.
        sources: Manifests to score on.
        config: The run.
        components: Pipelines of the run.
        folder: The run's folder.
        device: Where to train the CNN.
        step: Optimizer steps of the model, for the metrics and predictions in the folder; None writes nothing.

    Returns:
        The metrics, see `summarise_baselines`.
    """
    reader = FeatureReader(components.pipelines, segmentations=data.segmentations)

    def rows_of(sources: Sequence[DatasetConfig], words: str, *, is_test: bool) -> list[Row]:
        rows: list[Row] = []
        for source in sources:
            dataset = components.dataset(source, config=config, augment=False, may_end_with_user=is_test)
            indices: Sequence[int] = range(len(dataset))
            if is_test:
                report = config.report
                plan = plan_questions(
                    dataset, controls=report.controls, seed=config.seed, max_samples=report.max_samples
                )
                indices = sorted(question.index for question in plan if question.condition == "accuracy")
            with progress_bar(indices, words=words, unit="row", delay=1) as bar:
                rows += reader.rows(dataset, bar)
        return rows

    train = rows_of(data.train, "features of training scans", is_test=False)
    test = rows_of(sources, "features of test scans", is_test=True)
    with progress_bar(words="baselines", unit="question") as bar:

        def show(done: int, total: int, bar: Any = bar) -> None:
            bar.total = total
            bar.update(done - bar.n)

        predictions = predict_baselines(
            train,
            test,
            volumes=reader.volumes,
            subject_hash=folder.subject_hash(is_kept=step is not None),
            with_regions=data.segmentations is not None,
            seed=config.seed,
            device=device,
            progress=show,
        )
    metrics = summarise_baselines(predictions, seed=config.seed)
    if step is not None:
        folder.append_metrics({"step": step, **metrics})
        write_lines(
            folder.baselines,
            ({"baseline": name, **each.to_row()} for name, own in predictions.items() for each in own),
        )
    return metrics
