"""The best checkpoint by a logged value, and early stopping."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbrella_train.checkpoint.logged_loss import trainer_state_entries
from umbrella_train.distributed.fsdp2 import load_whole_state
from umbrella_train.distributed.ranks import is_first_rank
from umbrella_train.errors import RunError
from umbrella_train.trainer.checkpoints import Checkpoints

logger = logging.getLogger(__name__)

_NUM_WORSE = "values_without_improvement"


class BestCheckpoint(TrainerCallback):
    """Saves a checkpoint where a logged value improves, and stops the run when it has not done so for long.

    Hugging Face's own choice knows only keys that begin with `eval_`. The state is in trainer_state.json, in Hugging
    Face's fields and a count, so that a resumed run continues it.

    Args:
        checkpoints: Those of the run.
        metric: Key of a logged line.
        is_greater_better: Whether greater values are better.
        patience: Logged values without an improvement until the run stops; None: it does not.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, metric: str, is_greater_better: bool, patience: int | None = None
    ) -> None:
        self._checkpoints = checkpoints
        self._metric = metric
        self._sign = 1.0 if is_greater_better else -1.0
        self._patience = patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops a run that resumes from the step in which it was stopped early."""
        if self._patience is not None and trainer_state_entries(state).get(_NUM_WORSE, 0) >= self._patience:
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer, with the same values on every rank.

        Raises:
            RunError: An evaluation has no value of this key.
        """
        if self._metric in logs:
            self._compare(float(logs[self._metric]), state, control)
        elif self._metric.startswith("eval") and "eval_loss" in logs:
            known = ", ".join(key for key in logs if key.startswith(("eval_loss", "eval/loss/")))
            raise RunError(f"trainer.metric_for_best_model: {self._metric} is not logged; an evaluation has {known}")

    def _compare(self, value: float, state: TrainerState, control: TrainerControl) -> None:
        entries, best = trainer_state_entries(state), state.best_metric
        if math.isfinite(value) and (best is None or self._sign * value > self._sign * best):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(self._checkpoints.folder_of(state.global_step))
            entries[_NUM_WORSE] = 0
            # One that was due was saved before the evaluation.
            control.should_save |= self._checkpoints.saved_step != state.global_step
            return
        entries[_NUM_WORSE] = entries.get(_NUM_WORSE, 0) + 1
        if self._patience is not None and entries[_NUM_WORSE] >= self._patience:
            control.should_training_stop = True
            if is_first_rank():
                logger.info(
                    "stopped early after step %d: %s has not improved %d times; the best was %s in step %s",
                    state.global_step, self._metric, entries[_NUM_WORSE], best, state.best_global_step,
                )  # fmt: skip


def load_best_weights(trainer: Trainer, checkpoints: Checkpoints) -> dict[str, float]:
    """Loads the weights of the best checkpoint, also into shards; every rank must call it.

    Returns:
        `best/step` and `best/value`; empty if no value was finite, with a warning.

    Raises:
        RunError: The checkpoint is not there.
    """
    step, value = trainer.state.best_global_step, trainer.state.best_metric
    if not step or value is None:
        if is_first_rank():
            logger.warning("there is no best checkpoint: no value was finite; the last weights are kept")
        return {}
    folder = checkpoints.folder_of(step)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise RunError(f"{folder}: the best checkpoint has no weights")
    load_whole_state(trainer.accelerator.unwrap_model(trainer.model), files)
    if is_first_rank():
        logger.info("loaded the best weights, of step %d", step)
    return {"best/step": step, "best/value": value}
