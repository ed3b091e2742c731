"""Completes the checkpoints that Hugging Face's Trainer begins, and restores what they hold besides the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbrella_train.checkpoint.changes import write_record
from umbrella_train.checkpoint.integrity import (
    INTEGRITY_NAME,
    PICKLES,
    TRAINER_STATE_NAME,
    newest_valid_checkpoint,
    remove_old_checkpoints,
    write_integrity_manifest,
)
from umbrella_train.checkpoint.logged_loss import EVALUATION_DUE, keep_losses, restore_losses, trainer_state_entries
from umbrella_train.checkpoint.training_state import load_training_state, save_training_state
from umbrella_train.distributed.finite import check_finite
from umbrella_train.distributed.fsdp2 import is_sharded_model, whole_state_dict
from umbrella_train.distributed.ranks import is_first_rank, on_first_rank
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.hf_compat import save_checkpoint
from umbrella_train.stop_signals import StopSignals, without_worker_failures
from umbrella_train.trainer.evaluation_loss import EvaluationStoppedError
from umbrella_train.trainer.patch_embed_log import PatchEmbedLog

logger = logging.getLogger(__name__)

_MAX_HISTORY = 100

# Hugging Face's Trainer reads it under DeepSpeed, whose own files are pickles too.
_DEEPSPEED_SCHEDULE = "scheduler.pt"


class Checkpoints(TrainerCallback):
    """Writes and restores what Hugging Face's Trainer would pickle; DeepSpeed uses its own format.

    Hugging Face's Trainer writes the weights and trainer_state.json and then calls `on_save` on every rank. The
    integrity manifest is written last: a checkpoint without it is not valid, and older ones are removed only then. No
    random state is saved: a step's generator is seeded from (seed, step, rank), a sample's from its index.

    Args:
        trainer: The trainer, which may not be initialised yet.
        args: With the number of checkpoints to keep.
        patch_embeds: Its drift is saved and restored.
        layout: Settings that determine the samples of a step, in addition to those of the arguments.

    Attributes:
        run_record: Returns what a checkpoint records of its run, for `read_record`.
        saved_step: The step of the newest checkpoint that this trainer saved, or resumed from.
    """

    def __init__(
        self, trainer: Trainer, args: TrainingArguments, *, patch_embeds: PatchEmbedLog, layout: Mapping[str, Any]
    ) -> None:
        self._trainer = trainer
        self._patch_embeds = patch_embeds
        self.layout = {
            "seed": args.seed,
            "ranks": args.world_size,
            "batch": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            **layout,
        }
        self._limit = args.save_total_limit
        self._start: Path | None = None
        self._saving = ExitStack()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._finishing: Future[None] | None = None
        self.run_record: Callable[[], Mapping[str, Any]] = dict
        self.saved_step: int | None = None

    def choose(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from, by the argument of `Trainer.train`; True for the newest valid one.

        Raises:
            RunError: There is none, or it contains a pickle, which can run code when it is read.
        """
        self._start, self.saved_step = None, None
        if resume_from_checkpoint is True:
            run_folder = Path(self._trainer.args.output_dir or "")
            self._start = on_first_rank(lambda: newest_valid_checkpoint(run_folder))
        elif resume_from_checkpoint:
            self._start = Path(resume_from_checkpoint)
        if self._start is None:
            return None
        if not (self._start / TRAINER_STATE_NAME).is_file():
            raise RunError(f"{self._start}: is not a checkpoint: it has no {TRAINER_STATE_NAME}")
        pickles = {path.name for path in self._start.iterdir() if path.suffix in PICKLES}
        if self._trainer.is_deepspeed_enabled:
            pickles.discard(_DEEPSPEED_SCHEDULE)
        if pickles:
            raise RunError(
                f"{self._start}: contains {', '.join(sorted(pickles))}: such a file can run code when it is read, and "
                "no run of UMBRELLA writes it; remove it, or resume from another checkpoint"
            )
        return str(self._start)

    def write_model(self, folder: Path, *, is_checkpoint: bool) -> None:
        """Writes the unsharded model, if it is finite, and the processor; every rank must call it.

        As the start of a checkpoint, Hugging Face's Trainer continues it, and `on_save` ends it.
        """
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        check_finite(model, step=trainer.state.global_step)
        if is_checkpoint:
            self.wait()  # it would remove the folder of this one, which is not finished
            self._saving.enter_context(without_worker_failures())
            keep_losses(trainer)
            if trainer.args.should_save:
                (folder / INTEGRITY_NAME).unlink(missing_ok=True)  # of an earlier training into this folder
        state = None
        if trainer.is_deepspeed_enabled:
            state = trainer.accelerator.get_state_dict(trainer.deepspeed)
        elif is_sharded_model(model):
            state = whole_state_dict(model, keep=trainer.args.should_save)
        if trainer.args.should_save:
            model.save_pretrained(folder, state_dict=state)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)

    def folder_of(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return Path(self._trainer.args.output_dir or "") / f"checkpoint-{step}"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the training state; the integrity manifest follows in the background, and old ones are removed.

        Until then the older checkpoints are the valid ones. The files are complete, but hashing and flushing them takes
        as long as writing them.
        """
        folder = self.folder_of(state.global_step)
        with self._saving:
            self._save_training_state(folder)
            self._patch_embeds.drift.save(folder, is_writer=args.should_save)
            if dist.is_initialized():
                dist.barrier()
            if args.should_save:
                write_record(folder, self.run_record())
                best = state.best_model_checkpoint
                self._finishing = self._thread.submit(self._finish, folder, best=None if best is None else Path(best))
        self.saved_step = state.global_step

    def _finish(self, folder: Path, *, best: Path | None) -> None:
        write_integrity_manifest(folder)
        remove_old_checkpoints(folder.parent, keep=self._limit, best=best)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Raises what went wrong in the background, as a full disk."""
        if self._finishing is not None and self._finishing.done():
            self.wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Ends the last checkpoint; a signal is noted until then."""
        self.wait()

    def wait(self) -> None:
        """Waits until the newest checkpoint is valid; raises what went wrong with it."""
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Bounds what Hugging Face keeps in memory and in each checkpoint; metrics.jsonl has all logged lines."""
        del state.log_history[:-_MAX_HISTORY]

    @contextmanager
    def saved_around_evaluation(self, signals: StopSignals) -> Iterator[None]:
        """During a training, saves a due checkpoint before an evaluation, and one if a signal stops it.

        A resumed run does the evaluation again that a checkpoint was saved before.

        Raises:
            RunStoppedError: The evaluation was stopped, on all ranks.
        """
        trainer = self._trainer
        if not trainer.is_in_train:
            yield
            return
        entries = trainer_state_entries(trainer.state)
        entries[EVALUATION_DUE] = True
        # With metric_for_best_model, the best checkpoint is known only after the evaluation.
        if trainer.control.should_save and trainer.args.metric_for_best_model is None:
            self._save_now()
        try:
            yield
        except EvaluationStoppedError:
            self._save_now()
            folder, step = Path(trainer.args.output_dir or ""), trainer.state.global_step
            raise RunStoppedError(folder, step=step, signal_number=signals.number) from None
        entries[EVALUATION_DUE] = False

    def _save_now(self) -> None:
        trainer = self._trainer
        if self.saved_step != trainer.state.global_step:
            save_checkpoint(trainer)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restores the training state; Hugging Face's Trainer has restored the weights and its own state."""
        if self._start is None:
            return
        self._load_training_state(self._start, num_steps=state.global_step)
        self._patch_embeds.drift.load(self._start)
        restore_losses(self._trainer)
        self.saved_step = state.global_step

    def _save_training_state(self, folder: Path) -> None:
        is_writer = self._trainer.args.should_save
        if not self._trainer.is_deepspeed_enabled:
            save_training_state(folder, **self._parts(), is_writer=is_writer)
            return
        engine: Any = self._trainer.deepspeed
        engine.save_checkpoint(str(folder))
        if is_writer:
            assert self._trainer.lr_scheduler is not None
            torch.save(self._trainer.lr_scheduler.state_dict(), folder / _DEEPSPEED_SCHEDULE)

    def _load_training_state(self, folder: Path, *, num_steps: int) -> None:
        if not self._trainer.is_deepspeed_enabled:
            load_training_state(folder, **self._parts(), num_steps=num_steps)
        elif is_first_rank():
            logger.warning(
                "%s: DeepSpeed keeps the learning rate and other optimizer settings of its checkpoint and ignores "
                "those of the config",
                folder.name,
            )

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self._trainer.accelerator.unwrap_model(self._trainer.model),
            "optimizer": self._trainer.optimizer,
            "scheduler": self._trainer.lr_scheduler,
            "scaler": self._trainer.accelerator.scaler,
            "layout": self.layout,
        }
