"""`UmbrellaTrainer`: Hugging Face's Trainer with the dummy loss, the gradient log and the loss of each modality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments, optimization

from umbrella_model import parameter_groups
from umbrella_model.parts import Part
from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.batches.collators import NamedCollator, PackedCollator
from umbrella_train.config import DummyLossConfig
from umbrella_train.distributed.adafactor import Adafactor
from umbrella_train.distributed.deepspeed import call_before_step
from umbrella_train.distributed.finite import has_bad_gradient
from umbrella_train.distributed.fsdp2 import shard_model
from umbrella_train.distributed.tensors import full
from umbrella_train.dummy_loss.drift_monitor import DriftWatch
from umbrella_train.dummy_loss.loss import DummyLoss
from umbrella_train.dummy_loss.patch_embed_gradients import PatchEmbedGradients
from umbrella_train.errors import RunError
from umbrella_train.hf_compat import mark_as_prepared
from umbrella_train.stop_signals import StopSignals
from umbrella_train.trainer.accumulation import AccumulationWindow, WindowFacts
from umbrella_train.trainer.callbacks import RankParity, StepSeed, StopOnSignal
from umbrella_train.trainer.evaluation_loss import MixedEvaluationTrainer
from umbrella_train.trainer.loader import build_loader
from umbrella_train.trainer.non_finite import NonFiniteSteps
from umbrella_train.trainer.unsupported import check_trainer

# Hugging Face keeps every logged line in memory and in each checkpoint; metrics.jsonl has them all.
_MAX_HISTORY = 100


class UmbrellaTrainer(MixedEvaluationTrainer):
    """Trains an UMBRELLA model on batches of any mixture of modalities.

    Args:
        model: The model, not wrapped.
        args: Hugging Face's training arguments.
        dummy_loss: How absent modalities are kept in the graph.
        batches: Whether a batch has one set of modalities (`by_modality`), any (`mixed`), or any of similar length
            (`by_length`).
        max_tokens_per_batch: Token budget of a training batch, instead of its number of samples.
        packing: Whether the samples of a batch are concatenated in one row, without padding.
        engine: `ddp`: accelerate wraps the model if there are several ranks; `fsdp2`: it is sharded over them here.
        gradient_scale: `mean`: a patch embed's gradient is averaged over all supervised tokens of a step; `present`:
            over those of the samples with its modality.
        parity_every: Steps between comparisons of the replicated parameters over ranks; 0 for none.
        on_non_finite: `stop`: a loss or gradient that is not finite stops the run; `skip`: the step is skipped.
        max_skipped_steps: Steps that may be skipped; one more stops the run.
        part_learning_rates: Learning rates of parts of the model, instead of that of the arguments.
        signals: Of the whole command; None to handle signals during the training only.
        **kwargs: As for `transformers.Trainer`. `train_dataset` is an `InterleaveDataset` or a `ConversationDataset`,
            `data_collator` a `PaddingCollator`.

    Raises:
        RunError: With every unsupported combination of settings; nothing is written before.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        dummy_loss: DummyLossConfig | None = None,
        batches: Literal["by_modality", "mixed", "by_length"] = "by_modality",
        max_tokens_per_batch: int | None = None,
        packing: bool = False,
        engine: Literal["ddp", "fsdp2"] = "ddp",
        gradient_scale: Literal["mean", "present"] = "mean",
        parity_every: int = 100,
        on_non_finite: Literal["stop", "skip"] = "stop",
        max_skipped_steps: int = 10,
        part_learning_rates: Mapping[Part, float] | None = None,
        signals: StopSignals | None = None,
        **kwargs: Any,
    ) -> None:
        self.dummy_loss_config = dummy_loss or DummyLossConfig()
        check_trainer(
            model,
            args,
            dummy_loss=self.dummy_loss_config,
            engine=engine,
            gradient_scale=gradient_scale,
            packing=packing,
            on_non_finite=on_non_finite,
        )
        super().__init__(model, args, **kwargs)
        self.part_learning_rates = part_learning_rates or {}
        self.batches = batches
        self.max_tokens_per_batch = max_tokens_per_batch
        self.packing = packing
        if packing:
            self.data_collator = PackedCollator(self.data_collator)
        self.data_collator = NamedCollator(self.data_collator)
        self.dummy_loss = DummyLoss(
            scale=self.dummy_loss_config.scale,
            reduction=self.dummy_loss_config.reduction,
            sizes=self._unwrapped().dummy_sizes() if self.dummy_loss_config.reduction == "sum" else {},
        )
        self.gradient_scale = gradient_scale
        if engine == "fsdp2":
            self._shard()
        self._tower = next(module for module in self._unwrapped().modules() if isinstance(module, UmbrellaVisionTower))
        self.gradients = PatchEmbedGradients(self._tower, under_zero=self.is_deepspeed_enabled)
        self.modality_order = self._tower.modality_order
        self._window = AccumulationWindow(self.modality_order)
        self._drift: DriftWatch | None = None
        self._gradient_log: dict[str, float] = {}
        self._task_loss: Tensor | None = None
        self.signals = signals or StopSignals()
        self._stop = StopOnSignal(self.signals)
        self.add_callback(self._stop)
        self.add_callback(StepSeed())
        self.add_callback(RankParity(parity_every))
        self.non_finite = NonFiniteSteps(self, action=on_non_finite, max_skipped=max_skipped_steps)
        self.add_callback(self.non_finite)

    def _shard(self) -> None:
        model = self._unwrapped()
        shard_model(model, device=self.args.device)
        # In evaluation mode accelerate adds autocast and does not wrap the model.
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        mark_as_prepared(model)

    @property
    def stopped_by(self) -> int | None:
        """The signal that stopped the run before its last step; None if it trained to the end."""
        is_stopped = self._stop.is_agreed and self.state.global_step < self.state.max_steps
        return self.signals.number if is_stopped else None

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every epoch, in an order that depends only on (seed, epoch)."""
        return self._build_loader(self.train_dataset, self._train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's share of the evaluation samples, each exactly once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._build_loader(dataset, self.args.eval_batch_size, shuffle=False)

    def _build_loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        return build_loader(
            dataset,
            collate=self.data_collator,
            batch_size=batch_size,
            mode=self.batches,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            shuffle=shuffle,
            max_tokens=self.max_tokens_per_batch if shuffle else None,
            padded=not self.packing,
            num_epochs=math.ceil(self.args.num_train_epochs) if self.args.max_steps <= 0 else None,
            num_batches=self.args.max_steps * self.args.gradient_accumulation_steps,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetches one accumulation window, and records its modalities while the batches are still on the host."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last step: Hugging Face compares the number of steps only after one more.
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window.see(batches)
        self.non_finite.begin(batches)
        return batches, num_items

    # ---- optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Hugging Face's choice, with an Adafactor that also steps sharded parameters."""
        kind, options = MixedEvaluationTrainer.get_optimizer_cls_and_kwargs(args, model)
        return Adafactor if kind is optimization.Adafactor else kind, options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Hugging Face's optimizer, with parameter groups by learning rate if parts have their own."""
        if self.optimizer is None and self.part_learning_rates:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self._unwrapped())
            groups = parameter_groups(
                self._unwrapped(),
                learning_rate=self.args.learning_rate,
                part_learning_rates=self.part_learning_rates,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    # ---- one step, in this order: loss, backward, facts, checks, gradients, drift, log ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Task loss plus the dummy loss of the modalities absent from this batch.

        The terms are outputs of the wrapped model's forward. Task losses are summed over an accumulation window and
        averaged over ranks; the dummy loss is divided by the window's length, so that it grows with neither.
        """
        task_loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._task_loss = task_loss.detach()
        loss = task_loss
        if self.dummy_loss_config.enabled and outputs.dummy_terms:
            # Without num_items_in_batch the Trainer divides the whole loss by the window's length afterwards.
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = task_loss + self.dummy_loss(outputs.dummy_terms) / steps
        if model.training:
            self._window.add_loss(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; at the end of an accumulation window, `_before_optimizer_step` is called.

        Returns:
            The task loss, detached and without the dummy loss.

        Raises:
            NonFiniteError: A loss or a gradient of some rank is not finite, and the step is not skipped; or a
                parameter; raised before the optimizer step.
            RunError: A modality was absent under DDP with the dummy loss off.
        """
        if self.is_deepspeed_enabled:
            call_before_step(self.deepspeed, self._before_optimizer_step)
        try:
            super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error) and not self.dummy_loss_config.enabled:
                raise RunError(
                    "DDP found parameters without a gradient: a modality was absent from a batch and the dummy loss is "
                    "off; set dummy_loss.enabled: true"
                ) from error
            raise
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._before_optimizer_step()
        assert self._task_loss is not None
        return self._task_loss

    def _before_optimizer_step(self) -> None:
        """Shares the facts of the accumulation window between ranks, then checks, scales and clears gradients."""
        is_logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        scaler = self.accelerator.scaler
        facts = self._window.close(
            is_stop_asked=self.signals.is_asked,
            # A loss scaler checks gradients itself, skips such a step and reduces its scale.
            has_bad_gradient=None
            if scaler is not None and scaler.is_enabled()
            else has_bad_gradient(self._unwrapped()),
            norms=self._local_squared_norms() if is_logged else None,
        )
        self._stop.is_agreed = facts.is_stop_asked
        if self._drift is None:
            self._drift = DriftWatch(self._tower, under_zero=self.is_deepspeed_enabled)
        if not (facts.is_loss_finite and facts.is_gradient_finite):
            self.non_finite.handle(is_loss_finite=facts.is_loss_finite)
            self._task_loss = torch.zeros((), device=self.args.device)
            return
        factors = {}
        if self.gradient_scale == "present":
            factors = {name: facts.num_tokens / tokens for name, tokens in facts.tokens_with.items() if tokens}
            self.gradients.scale(factors)
        if self.dummy_loss_config.absent == "hold":
            self.gradients.clear([name for name in self.gradients.modalities if name not in facts.present])
        self._drift.before_step(facts.present, step=self.state.global_step)
        if is_logged:
            self._set_gradient_log(facts, factors)

    def _local_squared_norms(self) -> Tensor:
        norms = self.gradients.squared_norms()
        # Replicated gradients are equal on all ranks: only one rank contributes, so that the sum is exact.
        if self.args.process_index and not self.gradients.is_sharded:
            norms = torch.zeros_like(norms)
        return norms

    def _set_gradient_log(self, facts: WindowFacts, factors: Mapping[str, float]) -> None:
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        self._gradient_log = {}
        squares = self.gradients.add_up(facts.norms)
        for index, modality in enumerate(self.gradients.modalities):
            is_active = modality in facts.present
            keys = self.gradients.keys(modality, is_active=is_active)
            for key, square in zip(keys, squares[2 * index : 2 * index + 2], strict=True):
                self._gradient_log[key] = math.sqrt(square) / scale * factors.get(modality, 1.0)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return full(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return full(super()._get_grad_norm(model, grad_norm=grad_norm))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the gradient norm of each patch embed, its share of the total norm and its drift to the logged line."""
        if "train_runtime" in logs and self.stopped_by is not None:
            return  # of a part of the run
        logs = self.non_finite.add_counts(logs)
        if "loss" in logs and self._gradient_log:
            logs = {**logs, **self._gradient_log}
            total = float(logs.get("grad_norm") or 0.0)
            if total > 0:
                logs |= {
                    key.replace("grad/", "grad_share/", 1): norm / total
                    for key, norm in self._gradient_log.items()
                    if not key.endswith(".proj")
                }
            if self._drift is not None:
                logs |= self._drift.measure(step=self.state.global_step)
            self._gradient_log = {}
        super().log(logs, start_time)
        del self.state.log_history[:-_MAX_HISTORY]

    # ---- checkpoints ----

    def _layout(self) -> dict[str, Any]:
        layout = {**super()._layout(), "batches": self.batches, "max_tokens_per_batch": self.max_tokens_per_batch}
        if self.max_tokens_per_batch is not None:
            layout["packing"] = self.packing  # the budget then counts no padding
        return layout

    def save_training_state(self, folder: Path) -> None:
        """Writes optimizer, schedule and scaler, and the state of the drift."""
        super().save_training_state(folder)
        if self._drift is not None:
            self._drift.save(folder, is_writer=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._drift = DriftWatch(self._tower, under_zero=self.is_deepspeed_enabled)
            self._drift.load(Path(checkpoint))
