"""Evaluation of a run by generated answers: at the end of training, or by `evaluate_run` for a finished run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as hf_logging

from umbrella_data import read_manifest
from umbrella_data.progress import progress_bar
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.assembly.held_out import Overlap, check_held_out
from umbrella_train.assembly.masks import warn_of_other_masks
from umbrella_train.assembly.predict import load_processor
from umbrella_train.assembly.sources import MAX_ROWS_CHECKED, check_manifests, find_evaluation
from umbrella_train.config import DatasetConfig, RunConfig, load_config
from umbrella_train.end_of_turn import find_end_of_turn
from umbrella_train.errors import RunError
from umbrella_train.evaluation.generate import evaluate_dataset, merge_results
from umbrella_train.run_folder import RunFolder, check_output, write_lines

logger = logging.getLogger(__name__)


def evaluate_run(
    run_folder: Path,
    *,
    manifests: Sequence[Path] | None = None,
    data_root: Path | None = None,
    controls: bool | None = None,
    max_samples: int | None = None,
    out: Path | None = None,
    baselines: bool = False,
    segmentations: Path | None = None,
) -> dict[str, float]:
    """Scores a trained model, on its own held-out samples or on other manifests.

    Args:
        run_folder: The run.
        manifests: Manifests to score on instead of the run's own. Their rows may end with the user's turn.
        data_root: The folder that their paths are relative to.
        controls: Whether to ask with the controls too (default: as in the run's config).
        max_samples: Questions to ask for each combination of modalities.
        out: File to write the answers to, in JSON Lines: a row for each row of the manifests, in their order, also for
            those without an answer, see `umbrella_train.evaluation.answers.scored_row`. It appears once it is complete.
        baselines: Whether to train simple models on the run's training data, and score them on the same rows.
        segmentations: Folder of BIDS derivatives whose `*_dseg.nii.gz` give the baselines region volumes.

    Returns:
        The metrics, of rows with an answer, and those of the baselines (`baseline/volume/accuracy/T1/sex`). Those of a
        complete evaluation, as in the run's config, are also added to the run's files.

    Raises:
        RunError: The folder has no trained model, `out` cannot be written, or there is nothing to score on: no rows, or
            none with an answer and no `out`.
    """
    hf_logging.disable_progress_bar()
    folder = RunFolder.open(run_folder)
    if not (folder.model / "config.json").is_file():
        raise RunError(f"{folder.model}: has no model; the run did not finish")
    config = load_config(folder.config)
    # The report shows the newest evaluation: a partial one must not replace a complete one.
    is_complete = not manifests and max_samples is None and controls in (None, config.report.controls)
    changes: dict[str, Any] = {"controls": controls, "max_samples": max_samples}
    report = config.report.model_copy(update={key: value for key, value in changes.items() if value is not None})
    config = config.model_copy(update={"report": report})
    sources = _find_sources(config, manifests or (), data_root=data_root)
    if not sources:
        raise RunError(f"{run_folder}: the run has no evaluation manifests; name one with --manifest")
    if out is not None:
        check_output(out, inputs=[source.manifest for source in sources])
    elif not any(_has_answer(source) for source in sources):
        names = ", ".join(str(source.manifest) for source in sources)
        raise RunError(f"{names}: no row has an 'answer' to score; name a file for the model's answers with --out")
    overlap = _find_overlap(config, sources)
    baseline_data = None
    if baselines:
        from umbrella_train.run.baselines import evaluate_baselines, find_baseline_data  # late: imports scikit-learn

        baseline_data = find_baseline_data(config, segmentations=segmentations)
    processor = load_processor(folder.model)
    components = replace(
        build_components(config, weights=folder.model), asks_for_reasoning=processor.asks_for_reasoning
    )
    if manifests:
        warn_of_other_masks(sources, trained=processor.masked)
    device = torch.device("cpu" if config.trainer.use_cpu or not torch.cuda.is_available() else "cuda")
    components.list_bad_scans_in(folder.path)
    metrics = evaluate_sources(
        components.model,
        sources,
        config=config,
        components=components,
        folder=folder,
        device=device,
        step=folder.last_step() if is_complete else None,
        out=out,
    )
    if baseline_data is not None:
        metrics |= evaluate_baselines(
            baseline_data,
            sources,
            config=config,
            components=components,
            folder=folder,
            device=device,
            step=folder.last_step() if is_complete else None,
        )
    if is_complete:
        if overlap.metrics:
            folder.append_metrics({"step": folder.last_step(), **overlap.metrics})
        logger.info("added to %s", folder.metrics)
    else:
        logger.info("%s keeps its results: this was a partial evaluation, and nothing was written to it", run_folder)
    if out is not None:
        logger.info("answers: %s%s", out, "" if metrics else "; no row has an 'answer', so there are no scores")
    return metrics


def _find_sources(config: RunConfig, manifests: Sequence[Path], *, data_root: Path | None) -> Sequence[DatasetConfig]:
    """The manifests to score on, checked: the given ones, or the run's own."""
    if not manifests:
        return find_evaluation(config)
    sources = [DatasetConfig(manifest=path, data_root=data_root) for path in manifests]
    check_manifests(sources, config=config, may_end_with_user=True)
    return sources


def _find_overlap(config: RunConfig, sources: Sequence[DatasetConfig]) -> Overlap:
    """What the sources have in common with the run's training data, with a warning; nothing if those are elsewhere."""
    train = config.data.train
    if config.data.synthetic is not None or not all(source.manifest.is_file() for source in train):
        return Overlap()
    return check_held_out(train, sources, max_rows=MAX_ROWS_CHECKED, allow_overlap=True)


def _has_answer(source: DatasetConfig) -> bool:
    manifest = read_manifest(source.manifest, data_root=source.data_root, may_end_with_user=True)
    return any(sample.answer is not None for sample in manifest)


def evaluate_sources(
    model: Any,
    sources: Sequence[DatasetConfig],
    *,
    config: RunConfig,
    components: TrainingComponents,
    folder: RunFolder,
    device: torch.device,
    step: int | None,
    out: Path | None = None,
) -> dict[str, float]:
    """Generates answers to the samples of several manifests and scores them; every rank calls it.

    Args:
        model: The trained model, not sharded; moved to the device.
        sources: Manifests to score on.
        config: The run.
        components: Tokenizer and data sets of the run.
        folder: The run's folder.
        device: Where to compute.
        step: Optimizer steps of the model, for the metrics and predictions in the folder; None writes nothing.
        out: File that the first rank writes the answers to, of samples with and without an answer.

    Returns:
        The metrics over all manifests and ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(device)
    results = []
    for source in sources:
        with progress_bar(words="evaluating", unit="batch") as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            result = evaluate_dataset(
                model,
                components.dataset(source, config=config, augment=False, may_end_with_user=True),
                tokenizer=components.tokenizer,
                collator=components.collator(padding_side="left"),
                batch_size=config.trainer.per_device_eval_batch_size,
                max_new_tokens=config.report.max_new_tokens,
                device=device,
                subject_hash=folder.subject_hash(is_kept=rank == 0 and step is not None),
                end_of_turn=find_end_of_turn(
                    components.tokenizer, image_token_id=components.model.config.image_token_id
                ),
                controls=config.report.controls,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                max_samples=config.report.max_samples,
                every_row=out is not None,
                progress=show,
            )
        results.append(result)
    merged = merge_results(results, seed=config.seed)
    if rank == 0 and step is not None:
        folder.append_metrics({"step": step, **merged.metrics})
        folder.write_predictions(prediction.to_row() for prediction in merged.predictions)
    if rank == 0 and out is not None:
        write_lines(out, merged.answers)
    return merged.metrics
