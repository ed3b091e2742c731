"""Evaluation loss, overall and for each set of modalities, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from umbrella_train.batches.collators import num_conversations
from umbrella_train.checkpoint.logged_loss import EVALUATION_DUE, trainer_state_entries
from umbrella_train.checkpoint.trainer import WholeCheckpointTrainer
from umbrella_train.distributed.ranks import is_on_some_rank
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.stop_signals import StopSignals
from umbrella_train.trainer.non_finite import NonFiniteSteps


class EvaluationStoppedError(Exception):
    """A signal arrived in the evaluation during a training."""


class MixedEvaluationTrainer(WholeCheckpointTrainer):
    """Sums losses by token and set of modalities; logits are not gathered.

    Attributes:
        modality_order: The model's modalities in order.
        signals: Those that stop a training.
        non_finite: Names the samples of a loss that is not finite.
    """

    modality_order: Sequence[str]
    signals: StopSignals
    non_finite: NonFiniteSteps

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Saves a due checkpoint first: an unreadable held-out scan must not lose the steps before it.

        Raises:
            RunStoppedError: A signal arrived; after the checkpoint of this step was saved.
        """
        entries = trainer_state_entries(self.state)
        entries[EVALUATION_DUE] = True
        # With metric_for_best_model, the best checkpoint is known only after the evaluation.
        if self.control.should_save and self.args.metric_for_best_model is None:
            self._save_now(trial)
        try:
            metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStoppedError:
            self._save_now(trial)
            raise RunStoppedError(
                self._run_folder(), step=self.state.global_step, signal_number=self.signals.number
            ) from None
        entries[EVALUATION_DUE] = False
        return metrics

    def repeat_evaluation(self) -> None:
        """Does the evaluation of this step, whose checkpoint was saved before it."""
        self.saved_step = self.state.global_step
        self._evaluate(None, None)

    def _save_now(self, trial: Any) -> None:
        if self.saved_step == self.state.global_step:
            return
        assert self.model is not None
        self._save_checkpoint(self.model, trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control.should_save = False

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch of any mixture, without dummy terms."""
        if not prediction_loss_only:  # logits at all positions are requested
            inputs = {key: value for key, value in inputs.items() if key != "supervised_index"}
        ignored = [*(ignore_keys or ["past_key_values"]), "dummy_terms"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignored)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss per supervised token over all ranks, overall and for each set of modalities.

        Only sums are shared: ranks may have batches of different shapes and modalities.
        """
        assert self.model is not None
        model: nn.Module = self._wrap_model(self.model, training=False, dataloader=dataloader)
        if not self.is_in_train:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        total = EvaluationLoss(self.modality_order, device=self.args.device)
        is_bad: list[Tensor] = []
        for batch in dataloader:
            if self.is_in_train and is_on_some_rank(self.signals.is_asked, device=self.args.device):
                raise EvaluationStoppedError
            inputs = self._prepare_inputs(batch)
            loss, _, _ = self.prediction_step(model, inputs, prediction_loss_only=True)
            assert loss is not None
            total.add(loss, inputs)
            is_bad.append(~loss.isfinite())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics, num_samples = total.reduce(prefix=metric_key_prefix)
        if is_bad and not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            self.non_finite.warn_of_evaluation(model, dataloader, is_bad)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_samples)

    def predict(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not supported: logits of batches of different lengths and modalities do not form an array.

        Raises:
            RunError: Always.
        """
        raise RunError("predict is not supported; use umbrella-eval or umbrella-predict")


class RepeatEvaluation(TrainerCallback):
    """Does the evaluation of the step again that a run resumes from, if the checkpoint was saved before it.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: MixedEvaluationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if trainer_state_entries(state).get(EVALUATION_DUE):
            self._trainer.repeat_evaluation()


class EvaluationLoss:
    """Sums of loss and supervised tokens for every set of modalities, kept on the device.

    Args:
        modalities: The model's modalities in order.
        device: Device of the losses.
    """

    def __init__(self, modalities: Sequence[str], *, device: torch.device) -> None:
        # Every subset has a row on every rank, so that ranks with different sets can be summed.
        self._groups = [group for size in range(len(modalities) + 1) for group in combinations(modalities, size)]
        self._order = tuple(modalities)
        self._sums = torch.zeros(len(self._groups), 3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Adds one batch: its mean loss per token, weighted by its supervised tokens.

        Args:
            loss: 0-dim mean loss of the batch.
            inputs: The batch.
        """
        group = tuple(name for name in self._order if name in inputs["pixel_values"])
        labels = inputs["labels"]
        # The model shifts labels by one: the first position is never predicted.
        tokens = labels[:, 1:].ne(-100).sum().double()
        samples = torch.full_like(tokens, num_conversations(inputs))
        row = torch.stack([loss.double() * tokens, tokens, samples])
        self._sums[self._groups.index(group)] += row

    def reduce(self, *, prefix: str) -> tuple[dict[str, float], int]:
        """Metrics over all ranks, in one collective and one read.

        Args:
            prefix: First word of the keys.

        Returns:
            `{prefix}_loss`, `{prefix}/loss/T1`, `{prefix}/loss/T1+dMRI`, ...; and the number of samples.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        rows = self._sums.tolist()
        losses, tokens, samples = (sum(column) for column in zip(*rows, strict=True))
        metrics = {f"{prefix}_loss": losses / tokens if tokens else float("nan")}
        for group, (group_loss, group_tokens, _) in zip(self._groups, rows, strict=True):
            if group_tokens:
                metrics[f"{prefix}/loss/{'+'.join(group) or 'text'}"] = group_loss / group_tokens
        return metrics, int(samples)
