"""A Hugging Face Trainer that evaluates batches of any mixture by their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from umbrella_train.errors import RunError
from umbrella_train.evaluation_loss import EvaluationLoss
from umbrella_train.whole_checkpoints import WholeCheckpointTrainer


class MixedEvaluationTrainer(WholeCheckpointTrainer):
    """Adds losses up by token and set of modalities, and gathers no logits.

    Attributes:
        modality_order: The model's modalities in order.
    """

    modality_order: Sequence[str]

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Saves first where both are due: a held-out scan that cannot be read must not cost the steps before it."""
        # Which checkpoint is the best, where that is asked for, is known only after.
        if self.control.should_save and self.args.metric_for_best_model is None:
            assert self.model is not None
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_save = False
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch of any mixture; no dummy term is part of them."""
        if not prediction_loss_only:  # logits at all positions are asked for
            inputs = {key: value for key, value in inputs.items() if key != "supervised_index"}
        ignored = [*(ignore_keys or ["past_key_values"]), "dummy_terms"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignored)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,  # noqa: ARG002
        prediction_loss_only: bool | None = None,  # noqa: ARG002
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss a supervised token over all ranks, in all and for each set of modalities.

        Batches of different shapes and modalities on the ranks are no obstacle: only sums are shared.
        """
        assert self.model is not None
        model: nn.Module = self._wrap_model(self.model, training=False, dataloader=dataloader)
        if not self.is_in_train:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        total = EvaluationLoss(self.modality_order, device=self.args.device)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            loss, _, _ = self.prediction_step(model, inputs, prediction_loss_only=True)
            assert loss is not None
            total.add(loss, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics, num_samples = total.reduce(prefix=metric_key_prefix)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_samples)

    def predict(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not for this model: logits of batches of different lengths and modalities make no array.

        Raises:
            RunError: Always.
        """
        raise RunError("predict has no meaning here; ask a trained model with umbrella-eval or umbrella-predict")
