"""A run from its configuration to its report: `train`, and `evaluate_run` for a finished run."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from umbrella_model import checkpoint_parts
from umbrella_model.parts import Part
from umbrella_train.assembly.acceleration import compile_layers
from umbrella_train.assembly.build import Parts, build_parts
from umbrella_train.assembly.sources import (
    Sources,
    check_manifests,
    find_evaluation,
    name_cohort_directory,
    prepare_sources,
)
from umbrella_train.assembly.trained_model import is_trained_model, warn_of_other_pipelines
from umbrella_train.checkpoint.resume import find_checkpoint
from umbrella_train.config import DatasetConfig, RunConfig, dump_config, load_config
from umbrella_train.distributed.fsdp2 import is_sharded_model
from umbrella_train.end_of_turn import find_end_of_turn
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.generate import evaluate_dataset, merge_results
from umbrella_train.evaluation.score_table import score_table
from umbrella_train.report import build_report
from umbrella_train.run.pictures import draw_pictures
from umbrella_train.run_folder import RunFolder
from umbrella_train.trainer.arguments import build_arguments
from umbrella_train.trainer.callbacks import MetricsFile, ProgressBar
from umbrella_train.trainer.dry_run import DryRunTable, describe_model
from umbrella_train.trainer.loader import evaluation_batches
from umbrella_train.trainer.trackers import keep_trackers_private, log_to_trackers
from umbrella_train.trainer.trainer import UmbrellaTrainer
from umbrella_train.trainer.unsupported import check_trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, dry_run: bool = False, resume: str | None = None) -> Path | None:
    """Trains, evaluates and reports.

    Args:
        config: The run.
        dry_run: Two steps and a table of tokens and memory; nothing is saved.
        resume: `auto` for the newest valid checkpoint of the newest run of this name, or the folder of a run or of a
            checkpoint.

    Returns:
        The run's folder; None for a dry run.

    Raises:
        RunError: The launch does not match the config, or there is no checkpoint to resume from.
        RunStoppedError: The run was stopped by SIGTERM or Ctrl-C, after it saved a checkpoint.
    """
    hf_logging.disable_progress_bar()
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            _try_out(config, Path(scratch))
        return None
    config = name_cohort_directory(config)
    arguments = build_arguments(config, output_dir=config.output_dir / config.name)
    checkpoint = None if resume is None else find_checkpoint(config, resume)
    sources = prepare_sources(config)
    parts = build_parts(config)
    _reject_unsupported(config, arguments, parts)
    _check_evaluation(config, arguments, parts, sources)
    folder = _open_folder(config, checkpoint)
    arguments.output_dir = str(folder.path)
    trainer = _build_trainer(config, arguments, parts, sources)
    if trainer.is_world_process_zero():
        logger.info(describe_model(parts.model))
        _warn_of_start(config, parts)
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
    if sources.overlap and trainer.is_world_process_zero():
        counts = {"overlap/subjects": len(sources.overlap.subjects), "overlap/files": len(sources.overlap.files)}
        folder.append_metrics({"step": 0, **counts})
    trainer.add_callback(MetricsFile(folder))
    progress = ProgressBar()
    trainer.add_callback(progress)
    if config.report.pictures and trainer.is_world_process_zero():
        draw_pictures(sources.evaluation or sources.train, parts=parts, config=config, folder=folder.pictures)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()  # an error would otherwise be printed on the line of the bar
    if trainer.stopped_by is not None:
        raise RunStoppedError(folder.path, step=trainer.state.global_step, signal_number=trainer.stopped_by)
    trainer.save_model(str(folder.model))
    if sources.evaluation:
        scope = _Scope(config, parts, folder, device=arguments.device, step=trainer.state.global_step)
        scores = _evaluate(scope, sources.evaluation, model=_model_for_generation(config, trainer, folder=folder))
        if trainer.is_world_process_zero():
            logger.info("\n%s\n", score_table(scores))
    if config.report.enabled and trainer.is_world_process_zero():
        build_report([folder.path])
    return folder.path


def evaluate_run(
    run_folder: Path,
    *,
    manifests: Sequence[Path] | None = None,
    data_root: Path | None = None,
    controls: bool | None = None,
    max_samples: int | None = None,
) -> dict[str, float]:
    """Scores a trained model, on its own held-out samples or on other manifests.

    Args:
        run_folder: The run.
        manifests: Manifests to score on instead of the run's own.
        data_root: The folder that their paths are relative to.
        controls: Whether to ask with the controls too (default: as in the run's config).
        max_samples: Questions to ask for each combination of modalities.

    Returns:
        The metrics. Those of a complete evaluation, as in the run's config, are also added to the run's files.

    Raises:
        RunError: The folder has no trained model, or there is nothing to score on.
    """
    hf_logging.disable_progress_bar()
    folder = RunFolder.open(run_folder)
    if not (folder.model / "config.json").is_file():
        raise RunError(f"{folder.model}: has no model; the run did not finish")
    config = load_config(folder.config)
    # The report shows the newest evaluation: a partial one must not replace a complete one.
    is_whole = not manifests and max_samples is None and controls in (None, config.report.controls)
    changes: dict[str, Any] = {"controls": controls, "max_samples": max_samples}
    report = config.report.model_copy(update={key: value for key, value in changes.items() if value is not None})
    config = config.model_copy(update={"report": report})
    parts = build_parts(config, weights=folder.model)
    device = torch.device("cpu" if config.trainer.use_cpu or not torch.cuda.is_available() else "cuda")
    if manifests:
        evaluation: Sequence[DatasetConfig] = [DatasetConfig(manifest=path, data_root=data_root) for path in manifests]
        check_manifests(evaluation, config=config)
    else:
        evaluation = find_evaluation(config)
    if not evaluation:
        raise RunError(f"{run_folder}: the run has no evaluation manifests; name one with --manifest")
    scope = _Scope(config, parts, folder, device=device, step=-1 if is_whole else None)
    model: torch.nn.Module = parts.model
    metrics = _evaluate(scope, evaluation, model=model.to(device))
    if is_whole:
        logger.info("added to %s", folder.metrics)
    else:
        logger.info("%s keeps its results: this was a partial evaluation, and nothing was written", run_folder)
    return metrics


def _try_out(config: RunConfig, scratch: Path) -> None:
    """Runs two steps and prints the table."""
    arguments = build_arguments(config, output_dir=scratch, dry_run=True)
    sources = prepare_sources(config)
    parts = build_parts(config)
    _check_evaluation(config, arguments, parts, sources)
    trainer = _build_trainer(config, arguments, parts, sources)
    trainer.add_callback(DryRunTable(trainer))
    if trainer.is_world_process_zero():
        _warn_of_start(config, parts)
    trainer.train()


def _warn_of_start(config: RunConfig, parts: Parts) -> None:
    source = config.model.pretrained
    if source is not None and is_trained_model(source):
        warn_of_other_pipelines(source, parts.pipelines)
    fixed = config.model.random_and_fixed
    if fixed:
        logger.warning(
            "%s: random weights that are not trained; set model.pretrained, or train them too (model.learn.preset: "
            "full)",
            ", ".join(fixed),
        )


def _reject_unsupported(config: RunConfig, arguments: TrainingArguments, parts: Parts) -> None:
    """Rejects unsupported settings before a folder is created or the config of a resumed run is replaced."""
    plugin: Any = arguments.deepspeed_plugin
    check_trainer(
        parts.model,
        arguments,
        dummy_loss=config.dummy_loss,
        engine=config.trainer.engine,
        gradient_scale=config.trainer.gradient_scale,
        packing=config.data.packing,
        zero_stage=0 if plugin is None else plugin.zero_stage,
    )


def _check_evaluation(config: RunConfig, arguments: TrainingArguments, parts: Parts, sources: Sources) -> None:
    """Distributes the held-out samples to the ranks once, so that an error occurs before training."""
    if sources.evaluation and config.trainer.eval_steps is not None:
        evaluation_batches(
            parts.mixture(sources.evaluation, config=config, augment=False),
            batch_size=arguments.eval_batch_size,
            mode=config.data.batches,
            rank=arguments.process_index,
            world_size=arguments.world_size,
        )


def _build_trainer(config: RunConfig, arguments: TrainingArguments, parts: Parts, sources: Sources) -> UmbrellaTrainer:
    folder = Path(str(arguments.output_dir))
    recomputed = config.trainer.gradient_checkpointing
    if recomputed:
        # Not by the arguments: Hugging Face's trainer supports all layers or none.
        checkpoint_parts(parts.model, ("vision_tower", "language_model") if recomputed is True else (recomputed,))
    if config.trainer.torch_compile:
        compile_layers(parts.model)
    trainer = UmbrellaTrainer(
        model=parts.model,
        args=arguments,
        train_dataset=parts.mixture(sources.train, config=config, augment=True, folder=folder),
        eval_dataset=parts.mixture(sources.evaluation, config=config, augment=False, folder=folder)
        if sources.evaluation
        else None,
        data_collator=parts.collator(),
        processing_class=parts.processor(),
        dummy_loss=config.dummy_loss,
        batches=config.data.batches,
        max_tokens_per_batch=config.data.max_tokens_per_batch,
        packing=config.data.packing,
        engine=config.trainer.engine,
        gradient_scale=config.trainer.gradient_scale,
        parity_every=config.trainer.parity_every,
        part_learning_rates=cast(Mapping[Part, float], config.model.learn.learning_rates.given),
    )
    trainer.remove_callback(PrinterCallback)
    keep_trackers_private(trainer, config)
    return trainer


def _model_for_generation(config: RunConfig, trainer: UmbrellaTrainer, *, folder: RunFolder) -> torch.nn.Module:
    """The trained model; a sharded one is loaded unsharded, since ranks generate answers of different lengths."""
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    if not is_sharded_model(model):
        return model
    dist.barrier()
    whole: torch.nn.Module = build_parts(config, weights=folder.model).model
    return whole.to(trainer.args.device)


def _open_folder(config: RunConfig, checkpoint: Path | None) -> RunFolder:
    """The run's folder on every rank; the first rank creates a new one."""
    if checkpoint is not None:
        folder = RunFolder.open(checkpoint.parent)
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder.replace_config(dump_config(config), checkpoint=checkpoint.name)
        return folder
    shared: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        created = RunFolder.create(config.output_dir, name=config.name, config_text=dump_config(config))
        shared = [str(created.path)]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    assert shared[0] is not None
    return RunFolder(Path(shared[0]))


@dataclass(frozen=True)
class _Scope:
    """Inputs of an evaluation; `step` is -1 for the newest line of metrics.jsonl, None to write no line."""

    config: RunConfig
    parts: Parts
    folder: RunFolder
    device: torch.device
    step: int | None


def _evaluate(scope: _Scope, sources: Sequence[DatasetConfig], *, model: Any) -> dict[str, float]:
    config, parts = scope.config, scope.parts
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results = []
    for source in sources:
        with tqdm(desc="evaluating", file=sys.stderr, disable=rank > 0) as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            result = evaluate_dataset(
                model,
                parts.dataset(source, config=config, augment=False, folder=scope.folder.path),
                tokenizer=parts.tokenizer,
                collator=parts.collator(padding_side="left"),
                batch_size=config.trainer.per_device_eval_batch_size,
                max_new_tokens=config.report.max_new_tokens,
                device=scope.device,
                subject_hash=scope.folder.subject_hash(is_kept=rank == 0 and scope.step is not None),
                end_of_turn=find_end_of_turn(parts.tokenizer, image_token_id=parts.model.config.image_token_id),
                controls=config.report.controls,
                seed=config.seed,
                rank=rank,
                world_size=world_size,
                max_samples=config.report.max_samples,
                progress=show,
            )
        results.append(result)
    merged = merge_results(results, seed=config.seed)
    if rank == 0 and scope.step is not None:
        step = scope.folder.last_step() if scope.step < 0 else scope.step
        scope.folder.append_metrics({"step": step, **merged.metrics})
        log_to_trackers(merged.metrics, step=step)
        scope.folder.write_predictions(prediction.to_row() for prediction in merged.predictions)
    return merged.metrics
