"""Evaluation of a run by its answers to questions: at the end of training, or by `evaluate_run` for a finished run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as hf_logging

from umbrella_data.progress import progress_bar
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.assembly.held_out import Overlap, check_held_out
from umbrella_train.assembly.masks import warn_of_other_masks
from umbrella_train.assembly.predict import load_processor
from umbrella_train.assembly.sources import MAX_ROWS_CHECKED, Sources, check_manifests, find_answer_spaces, find_sources
from umbrella_train.assembly.subject_parts import open_source
from umbrella_train.checkpoint.changes import read_record, run_settings
from umbrella_train.checkpoint.integrity import checkpoint_folders
from umbrella_train.config import DatasetConfig, RunConfig, load_config
from umbrella_train.end_of_turn import find_end_of_turn
from umbrella_train.errors import RunError
from umbrella_train.evaluation.answer_space import read_answer_spaces
from umbrella_train.evaluation.generate import EvaluationResult, evaluate_dataset
from umbrella_train.evaluation.metrics import fit_temperatures, summarise
from umbrella_train.evaluation.text_scores import text_scores
from umbrella_train.run_folder import RunFolder, check_output, fold_folders, write_lines

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
            none with an answer and no `out`; or the manifests that were split by subject have changed.
    """
    hf_logging.disable_progress_bar()
    folder = RunFolder.open(run_folder)
    if folds := fold_folders(run_folder):
        raise RunError(f"{run_folder}: is a cross-validation with a model in each fold; name one, as in {folds[0]}")
    if not (folder.model / "config.json").is_file():
        raise RunError(f"{folder.model}: has no model; the run did not finish")
    config = load_config(folder.config)
    # The report shows the newest evaluation: a partial one must not replace a complete one.
    is_complete = not manifests and max_samples is None and controls in (None, config.report.controls)
    changes: dict[str, Any] = {"controls": controls, "max_samples": max_samples}
    report = config.report.model_copy(update={key: value for key, value in changes.items() if value is not None})
    config = config.model_copy(update={"report": report})
    found = _find_sources(folder, config, manifests=manifests, data_root=data_root, out=out)
    sources = found.evaluation
    overlap = _find_overlap(config, found)
    baseline_data = None
    if baselines:
        from umbrella_train.run.baselines import evaluate_baselines, find_baseline_data  # late: imports scikit-learn

        baseline_data = find_baseline_data(found.train, config=config, segmentations=segmentations)
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
        found,
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


def _find_sources(
    folder: RunFolder, config: RunConfig, *, manifests: Sequence[Path] | None, data_root: Path | None, out: Path | None
) -> Sources:
    """The rows to score on, checked; arguments and errors are those of `evaluate_run`."""
    given = [DatasetConfig(manifest=path, data_root=data_root) for path in manifests] if manifests else None
    check_manifests(given or (), config=config, may_end_with_user=True)
    found = find_sources(config, given)
    if given is None:
        _check_parts(folder, config, found)
    if not found.evaluation:
        raise RunError(f"{folder.path}: the run has no evaluation manifests; name one with --manifest")
    if out is not None:
        check_output(out, inputs=[source.manifest for source in found.evaluation])
    elif not any(_has_answer(source) for source in found.evaluation):
        names = ", ".join(str(source.manifest) for source in found.evaluation)
        raise RunError(f"{names}: no row has an 'answer' to score; name a file for the model's answers with --out")
    return found


def _check_parts(folder: RunFolder, config: RunConfig, sources: Sources) -> None:
    """Rejects parts by subject that are not those of the training, which a checkpoint has recorded.

    Raises:
        RunError: The manifests have changed, so that subjects may be in other parts.
    """
    checkpoints = checkpoint_folders(folder.path)
    if not checkpoints or (config.data.fold is None and not sources.calibration):
        return
    before = read_record(checkpoints[max(checkpoints)]).get("settings", {})
    now = run_settings(config, train=sources.train, evaluation=(), num_ranks=1)
    changed = [key for key in now if key.endswith(".content") and key in before and before[key] != now[key]]
    if changed:
        raise RunError(
            f"{folder.path}: the training manifests have changed since the run ({', '.join(changed)}): "
            "subjects may be in other parts; restore them, or name manifests with --manifest"
        )


def _find_overlap(config: RunConfig, sources: Sources) -> Overlap:
    """What the sources have in common with the run's training data, with a warning; nothing if those are elsewhere."""
    train = [*sources.train, *sources.calibration]
    if config.data.synthetic is not None or not train:
        return Overlap()
    return check_held_out(train, sources.evaluation, max_rows=MAX_ROWS_CHECKED, allow_overlap=True)


def _has_answer(source: DatasetConfig) -> bool:
    manifest = open_source(source, may_end_with_user=True)
    return any(sample.answer is not None for sample in manifest)


def evaluate_sources(
    model: Any,
    sources: Sources,
    *,
    config: RunConfig,
    components: TrainingComponents,
    folder: RunFolder,
    device: torch.device,
    step: int | None,
    out: Path | None = None,
) -> dict[str, float]:
    """Asks the questions of the evaluation manifests and scores the answers; every rank calls it.

    Args:
        model: The trained model, not sharded; moved to the device.
        sources: Manifests to score on, and those to fit the temperature of probabilities on.
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
    end_of_turn = find_end_of_turn(components.tokenizer, image_token_id=components.model.config.image_token_id)
    if folder.answers.exists():
        spaces = read_answer_spaces(folder.answers)
    else:  # a run of an earlier version, whose folder may be read-only
        spaces = find_answer_spaces(sources.train, config=config)
    texts = text_scores(laterality_lexicon=config.report.laterality_lexicon)  # first: may be rejected

    def ask(source: DatasetConfig, words: str, **options: Any) -> EvaluationResult:
        with progress_bar(words=words, unit="batch") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return evaluate_dataset(
                model,
                components.dataset(source, config=config, augment=False, may_end_with_user=True),
                tokenizer=components.tokenizer,
                collator=components.collator(padding_side="left"),
                batch_size=config.trainer.per_device_eval_batch_size,
                max_new_tokens=config.report.max_new_tokens,
                device=device,
                end_of_turn=end_of_turn,
                spaces=spaces,
                grids=config.report.number_grids,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                max_samples=config.report.max_samples,
                progress=show,
                **options,
            )

    names = folder.subject_hash(is_kept=rank == 0 and step is not None)
    controls, every_row = config.report.controls, out is not None
    results = [
        ask(source, "evaluating", subject_hash=names, controls=controls, every_row=every_row)
        for source in sources.evaluation
    ]
    fitted = [
        ask(source, "calibrating", subject_hash=str, controls=False, is_generated=False)
        for source in sources.calibration
    ]
    predictions = [prediction for result in results for prediction in result.predictions]
    metrics = summarise(
        predictions,
        seed=config.seed,
        temperatures=fit_temperatures([prediction for result in fitted for prediction in result.predictions]),
        texts=texts,
    )
    if rank == 0 and step is not None:
        folder.append_metrics({"step": step, **metrics})
        folder.write_predictions(prediction.to_row() for prediction in predictions)
    if rank == 0 and out is not None:
        write_lines(out, [row for result in results for row in result.answers])
    return metrics
