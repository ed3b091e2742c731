"""Callbacks: seeds per step, rank parity, metrics file, late evaluation, progress bar, stopping on a signal."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbrella_data.progress import progress_bar
from umbrella_train.checkpoint.logged_loss import EVALUATION_DUE, trainer_state_entries
from umbrella_train.distributed.parity import check_rank_parity
from umbrella_train.run_folder import RunFolder
from umbrella_train.stop_signals import StopSignals

logger = logging.getLogger(__name__)


def seed_step(args: TrainingArguments, state: TrainerState) -> None:
    """Seeds torch from (seed, step, rank), for the next step."""
    words = f"{args.seed}/{state.global_step}/{args.process_index}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1)


class StepSeed(TrainerCallback):
    """Seeds torch from (seed, step, rank) before every step: a resumed run has the dropout of an unbroken one."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        seed_step(args, state)


class RankParity(TrainerCallback):
    """Compares the parameters over ranks every few steps; 0: never."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer, on every rank at the same step."""
        if self._every and state.global_step % self._every == 0 and model is not None:
            check_rank_parity(model, step=state.global_step)


class MetricsFile(TrainerCallback):
    """Appends every logged line to `metrics.jsonl`, independently of trackers.

    A run that resumes passes the `mark` of `RunFolder.mark_metrics` at its checkpoint.
    """

    def __init__(self, folder: RunFolder, mark: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._mark = mark

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Removes lines after the checkpoint that a resumed run starts from; they will be written again."""
        if state.is_world_process_zero:
            self._folder.cut_metrics(state.global_step, self._mark)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero and logs:
            self._folder.append_metrics({"step": state.global_step, **logs})


class RepeatEvaluation(TrainerCallback):
    """Does the evaluation of the step again that a run resumes from, if the checkpoint was saved before it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if trainer_state_entries(state).get(EVALUATION_DUE):
            self._trainer.evaluate()


class ProgressBar(TrainerCallback):
    """Progress with the step, the loss and the remaining time; Hugging Face's bar also prints every log line."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero:
            if state.global_step >= state.max_steps:
                logger.info("all %d steps are done: nothing is left to train", state.max_steps)
            self._bar = progress_bar(total=state.max_steps, initial=state.global_step, words="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)  # in a file, a refresh is another line

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        self.close()

    def close(self) -> None:
        """Ends the line, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops when a signal arrives, or the deadline.

    If one rank stopped alone, the others would wait forever: the trainer shares `signals.is_asked` with all ranks once
    per optimizer step, and sets `is_agreed` on all of them in the same step.

    Args:
        signals: Installed by a command for its whole duration; None to handle signals during the training only.

    Attributes:
        signals: Those of this rank.
        is_agreed: Whether some rank is to stop.
    """

    def __init__(self, signals: StopSignals | None = None) -> None:
        self.signals = signals or StopSignals()
        self.is_agreed = False
        self._is_own = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        self._is_own = not self.signals.is_installed
        if self._is_own:
            self.signals.install()
        self.signals.is_training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if self.is_agreed:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        self.signals.is_training = False
        if self._is_own:
            self.signals.restore()
