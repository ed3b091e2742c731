"""A run from its configuration to its report."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from umbrella_model import checkpoint_parts
from umbrella_model.parts import Part
from umbrella_train.assembly.acceleration import compile_layers
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.assembly.conversation_check import check_conversations
from umbrella_train.assembly.masks import answers_start_with_reasoning, masked_modalities, warn_of_other_masks
from umbrella_train.assembly.sources import (
    MAX_ROWS_CHECKED,
    Sources,
    name_cohort_directory,
    prepare_sources,
    save_answer_spaces,
    warn_of_repeated_fits,
)
from umbrella_train.assembly.trained_model import warn_of_other_pipelines
from umbrella_train.checkpoint.changes import (
    Changes,
    changed_settings,
    check_changes,
    describe_changes,
    run_settings,
)
from umbrella_train.checkpoint.resume import AUTO, Start, find_start, open_folder
from umbrella_train.config import RunConfig
from umbrella_train.distributed.fsdp2 import is_sharded_model
from umbrella_train.distributed.launcher import stop_with_launcher
from umbrella_train.distributed.rank_watch import RankWatch
from umbrella_train.distributed.ranks import is_first_rank, is_on_some_rank, on_first_rank
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.score_table import score_table
from umbrella_train.evaluation.text_scores import text_scores
from umbrella_train.processor import UmbrellaProcessor
from umbrella_train.run.evaluation import evaluate_sources
from umbrella_train.run.faults import as_run_error
from umbrella_train.run.pictures import draw_pictures
from umbrella_train.run_folder import RunFolder
from umbrella_train.stop_signals import StoppedAtOnce, StopSignals, find_deadline
from umbrella_train.trainer.arguments import build_arguments
from umbrella_train.trainer.best_checkpoint import BestCheckpoint, load_best_weights
from umbrella_train.trainer.callbacks import MetricsFile, ProgressBar, RepeatEvaluation
from umbrella_train.trainer.dry_run import StepCosts, describe_model
from umbrella_train.trainer.tracking import Trackers
from umbrella_train.trainer.trainer import UmbrellaTrainer

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    dry_run: bool = False,
    resume: str | None = None,
    allow_changed: Collection[str] = (),
    max_time: float | None = None,
) -> Path | None:
    """Trains, evaluates and reports.

    Args:
        config: The run.
        dry_run: Two steps and a table of tokens and memory; nothing is saved.
        resume: `auto` for the newest valid checkpoint of the newest run of this name, or a new run without one; or the
            folder of a run or of a checkpoint.
        allow_changed: Keys and sections of the configuration that may differ from those of the checkpoint; `ranks` for
            the number of processes.
        max_time: Seconds until the run saves and stops, if SLURM does not end it earlier; with
            `trainer.save_before_seconds` to spare.

    Returns:
        The run's folder; None for a dry run.

    Raises:
        RunError: The launch does not match the config, or there is no checkpoint to resume from, or other settings
            than those of the checkpoint are not allowed, or the job's time is too short.
        RunStoppedError: The run was stopped by a signal or at its deadline, after it saved a checkpoint unless there
            was nothing to save.
    """
    if config.stages:
        raise RunError("stages: this is a list of runs; train them with umbrella_train.train_stages")
    hf_logging.disable_progress_bar()
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            _dry_run(config, Path(scratch))
        return None
    signals = StopSignals(deadline=find_deadline(max_time, save_before_seconds=config.trainer.save_before_seconds))
    reached = _Reached()
    signals.install()
    stop_with_launcher()
    try:
        with ExitStack() as locks:
            try:
                return _run(
                    config, resume=resume, allow_changed=allow_changed, locks=locks, signals=signals, reached=reached
                )
            except StoppedAtOnce as stopped:
                raise reached.stopped_by(stopped.signal_number) from None
            except RunStoppedError as stopped:
                reached.step = stopped.step
                raise reached.stopped_by(stopped.signal_number) from None
            except Exception as error:
                folder = config.output_dir if reached.folder is None else reached.folder.path
                shown = as_run_error(error, folder=folder, watch=reached.watch)
                if shown is error:
                    raise
                raise shown from error
    finally:
        if reached.watch is not None:
            reached.watch.finish()
        signals.restore()


@dataclass
class _Reached:
    """How far a run has come, for the message and the marks of a run that ends early."""

    folder: RunFolder | None = None
    step: int = 0
    watch: RankWatch | None = None

    def stopped_by(self, signal_number: int) -> RunStoppedError:
        """Marks the folder for scripts that start the run again, unless the user stopped it."""
        if self.folder is not None and signal_number != signal.SIGINT and is_first_rank():
            with contextlib.suppress(OSError):  # the exit code counts, also on a full disk
                self.folder.requeue.touch()
        path = None if self.folder is None else self.folder.path
        return RunStoppedError(path, step=self.step, signal_number=signal_number)


def _run(
    config: RunConfig,
    *,
    resume: str | None,
    allow_changed: Collection[str],
    locks: ExitStack,
    signals: StopSignals,
    reached: _Reached,
) -> Path:
    config = name_cohort_directory(config)
    arguments = build_arguments(config, output_dir=config.output_dir)
    reached.watch = RankWatch(arguments.ddp_timeout)
    start = find_start(config, resume, locks=locks)
    if start.folder is not None and start.is_finished:
        logger.info("%s: is finished, with this configuration: nothing is left to do", start.folder.path)
        return start.folder.path
    reached.folder, reached.step = start.folder, start.step
    sources = prepare_sources(config)
    settings, changes = on_first_rank(lambda: _compare(config, sources, start, arguments, allow_changed))
    components = build_components(config)
    # The trainer rejects unsupported settings before a folder is created or the config of a resumed run is replaced.
    trainer = _build_trainer(config, arguments, components, sources, signals=signals, watch=reached.watch)
    folder = on_first_rank(lambda: open_folder(config, start, changes=changes, is_only=resume == AUTO, locks=locks))
    reached.folder, reached.step = folder, start.step
    trainer.args.output_dir = str(folder.path)
    trainer.checkpoints.run_record = lambda: {"settings": settings, "metrics": folder.mark_metrics()}
    components.list_bad_scans_in(folder.path)
    trainer.non_finite.folder = folder.path
    on_first_rank(lambda: save_answer_spaces(folder.answers, sources.train, config=config))
    if trainer.is_world_process_zero():
        _log_start(config, components, sources, trainer)
        if start.checkpoint is not None:
            logger.info("resuming from %s", start.checkpoint)
        for line in describe_changes(changes):
            logger.warning("changed since the checkpoint: %s", line)
        num_parameters = sum(parameter.numel() for parameter in components.model.parameters())
        trackers = Trackers(config, folder.path, step=start.step, num_parameters=num_parameters)
        folder = replace(folder, on_metrics=locks.enter_context(trackers).log)
    if sources.overlap.metrics and trainer.is_world_process_zero():
        folder.append_metrics({"step": 0, **sources.overlap.metrics})
    trainer.add_callback(MetricsFile(folder, start.record.get("metrics")))
    _choose_best(trainer, config)
    trainer.add_callback(RepeatEvaluation(trainer))  # after the file of metrics was cut
    progress = ProgressBar()
    trainer.add_callback(progress)
    if config.report.pictures and trainer.is_world_process_zero():
        draw_pictures(sources.evaluation or sources.train, components=components, config=config, folder=folder)
    try:
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    finally:
        progress.close()  # an error would otherwise be printed on the line of the bar
    reached.step = trainer.state.global_step
    if is_on_some_rank(signals.is_asked, device=trainer.args.device):  # also in the last step, or while it was saved
        raise RunStoppedError(folder.path, step=reached.step, signal_number=signals.number)
    _write_results(config, trainer, components, sources, folder=folder)
    return folder.path


def _choose_best(trainer: UmbrellaTrainer, config: RunConfig) -> None:
    """Lets the trainer look for the best checkpoint, if one is asked for."""
    section = config.trainer
    if section.best_metric is not None:
        best = BestCheckpoint(
            trainer.checkpoints,
            metric=section.best_metric,
            is_greater_better=bool(section.greater_is_better),
            patience=section.early_stopping_patience,
        )
        trainer.add_callback(best)


def _write_results(
    config: RunConfig, trainer: UmbrellaTrainer, components: TrainingComponents, sources: Sources, *, folder: RunFolder
) -> None:
    """Writes the weights, the scores and the report of a trained run, and marks it as finished."""
    step = trainer.state.global_step
    if config.trainer.load_best_model_at_end:
        best = load_best_weights(trainer, trainer.checkpoints)
        if best and trainer.is_world_process_zero():
            folder.append_metrics({"step": step, **best})
    trainer.save_model(str(folder.model))
    if sources.evaluation:
        scores = evaluate_sources(
            _model_for_generation(config, trainer, folder=folder),
            sources,
            config=config,
            components=components,
            folder=folder,
            device=trainer.args.device,
            step=step,
        )
        if trainer.is_world_process_zero():
            logger.info("\n%s\n", score_table(scores))
    if config.report.enabled and trainer.is_world_process_zero():
        from umbrella_train.report import build_report  # late: imports matplotlib

        build_report([folder.path])
    if trainer.is_world_process_zero():
        folder.finished.touch()


def _compare(
    config: RunConfig, sources: Sources, start: Start, arguments: TrainingArguments, allowed: Collection[str]
) -> tuple[dict[str, Any], Changes]:
    """The settings that alter the run, and which of them differ from the checkpoint's; rejects what is not allowed."""
    settings = run_settings(config, train=sources.train, evaluation=sources.evaluation, num_ranks=arguments.world_size)
    before = start.record.get("settings")
    changes = {} if before is None else changed_settings(before, settings)
    if start.checkpoint is not None or allowed:
        keys = settings.keys() | (before or {}).keys()
        check_changes(changes, allowed=allowed, keys=keys, checkpoint=start.checkpoint or config.output_dir)
    return settings, changes


def _dry_run(config: RunConfig, scratch: Path) -> None:
    """Runs two steps and logs what they cost."""
    arguments = build_arguments(config, output_dir=scratch, dry_run=True)
    sources = prepare_sources(config)
    components = build_components(config)
    trainer = _build_trainer(config, arguments, components, sources)
    components.list_bad_scans_in(scratch)
    trainer.add_callback(StepCosts())
    if trainer.is_world_process_zero():
        _log_start(config, components, sources, trainer)
    trainer.train()


def _log_start(config: RunConfig, components: TrainingComponents, sources: Sources, trainer: UmbrellaTrainer) -> None:
    """Logs the table of parameters and tokens, and warns of what is probably not intended."""
    logger.info(describe_model(components.model))
    warn_of_other_pipelines(config.model, components.pipelines, sources=sources.train)
    warn_of_other_masks(sources.evaluation, trained=cast(UmbrellaProcessor, trainer.processing_class).masked)
    warn_of_repeated_fits(sources, config=config)
    fixed = config.model.random_and_fixed
    if fixed:
        logger.warning(
            "%s: random weights that are not trained; set model.pretrained, or train them too (model.learn.preset: "
            "full)",
            ", ".join(fixed),
        )


def _build_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    components: TrainingComponents,
    sources: Sources,
    *,
    signals: StopSignals | None = None,
    watch: RankWatch | None = None,
) -> UmbrellaTrainer:
    datasets = [components.dataset(source, config=config, augment=True) for source in sources.train]
    asked = (*sources.evaluation, *sources.calibration)
    datasets += [components.dataset(source, config=config, augment=False) for source in asked]
    check_conversations(datasets, max_rows=MAX_ROWS_CHECKED)
    text_scores(laterality_lexicon=config.report.laterality_lexicon)  # its errors before the training, not after it
    recomputed = config.trainer.gradient_checkpointing
    if recomputed:
        # Not by the arguments: Hugging Face's trainer supports all layers or none.
        checkpoint_parts(components.model, ("vision_tower", "language_model") if recomputed is True else (recomputed,))
    if config.trainer.torch_compile:
        compile_layers(components.model)
    trainer = UmbrellaTrainer(
        model=components.model,
        args=arguments,
        train_dataset=components.mixture(sources.train, config=config, augment=True),
        eval_dataset=components.mixture(sources.evaluation, config=config, augment=False)
        if sources.evaluation
        else None,
        data_collator=components.collator(),
        processing_class=components.processor(
            masked=masked_modalities(sources.train), asks_for_reasoning=answers_start_with_reasoning(sources.train)
        ),
        dummy_loss=config.dummy_loss,
        batches=config.data.batches,
        max_tokens_per_batch=config.data.max_tokens_per_batch,
        packing=config.data.packing,
        engine=config.trainer.engine,
        gradient_scale=config.trainer.gradient_scale,
        parity_every=config.trainer.parity_every,
        on_non_finite=config.trainer.on_non_finite,
        max_skipped_steps=config.trainer.max_skipped_steps,
        part_learning_rates=cast(Mapping[Part, float], config.model.learn.learning_rates.given),
        signals=signals,
        watch=watch,
    )
    if config.trainer.load_best_model_at_end and trainer.is_deepspeed_enabled:
        raise RunError("trainer.load_best_model_at_end is not supported with DeepSpeed")
    trainer.remove_callback(PrinterCallback)
    if sources.evaluation and config.trainer.eval_steps is not None:
        trainer.get_eval_dataloader()  # samples that cannot be distributed to the ranks raise before training
    return trainer


def _model_for_generation(config: RunConfig, trainer: UmbrellaTrainer, *, folder: RunFolder) -> torch.nn.Module:
    """The trained model; a sharded one is loaded unsharded, since ranks generate answers of different lengths."""
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    if not is_sharded_model(model):
        return model
    dist.barrier()
    return build_components(config, weights=folder.model).model
