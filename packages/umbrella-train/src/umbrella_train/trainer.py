"""`UmbrellaTrainer`: Hugging Face's Trainer with the dummy loss, the gradient log and the loss of each modality."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.callbacks import StepSeed, StopOnSignal
from umbrella_train.checkpoint import seal_checkpoint
from umbrella_train.config import DummyLossConfig
from umbrella_train.dummy_loss import DummyLoss
from umbrella_train.errors import RunError
from umbrella_train.evaluation_loss import EvaluationLoss
from umbrella_train.gradients import PatchEmbedGradients
from umbrella_train.loader import build_loader
from umbrella_train.window import AccumulationWindow, WindowFacts


class NonFiniteError(RunError):
    """The loss is not finite; the message names the first parameter that is not, if there is one."""


class UmbrellaTrainer(Trainer):
    """Trains an UMBRELLA model on batches of any mixture of modalities.

    Args:
        *args: As for `transformers.Trainer`. `train_dataset` is an `InterleaveDataset` or a `ConversationDataset`,
            `data_collator` a `PaddingCollator`.
        dummy_loss: How absent modalities are kept in the graph.
        batches: Whether a batch holds one set of modalities (`by_modality`), any (`mixed`), or any of like length
            (`by_length`).
        max_tokens_per_batch: Token budget of a training batch, in place of its number of samples.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        dummy_loss: DummyLossConfig | None = None,
        batches: Literal["by_modality", "mixed", "by_length"] = "by_modality",
        max_tokens_per_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches
        self.max_tokens_per_batch = max_tokens_per_batch
        self.dummy_loss_config = dummy_loss or DummyLossConfig()
        self.dummy_loss = DummyLoss(
            scale=self.dummy_loss_config.scale,
            reduction=self.dummy_loss_config.reduction,
            sizes=self._unwrapped().dummy_sizes() if self.dummy_loss_config.reduction == "sum" else {},
        )
        tower = next(module for module in self._unwrapped().modules() if isinstance(module, UmbrellaVisionTower))
        self.gradients = PatchEmbedGradients(tower)
        self._window = AccumulationWindow(tower.modality_order)
        self._gradient_log: dict[str, float] = {}
        self._task_loss: Tensor | None = None
        self._stop = StopOnSignal()
        self.add_callback(self._stop)
        self.add_callback(StepSeed())

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of every epoch, in an order that depends on (seed, epoch) alone."""
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
            num_epochs=math.ceil(self.args.num_train_epochs) if self.args.max_steps <= 0 else None,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetches one accumulation window, and notes its modalities while the batches are still on the host."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window.see(batches)
        return batches, num_items

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Task loss plus the dummy loss of the modalities absent from this batch.

        The terms come out of the wrapped model's forward. Task losses add up over an accumulation window and are
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
        """One forward and backward; at the end of a window the ranks agree on what happened in it.

        Returns:
            The task loss alone, detached.

        Raises:
            NonFiniteError: The loss of some rank is not finite; raised before the optimiser steps.
            RunError: A modality was absent under DDP with the dummy loss off.
        """
        try:
            super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error) and not self.dummy_loss_config.enabled:
                raise RunError(
                    "DDP found parameters without a gradient: a modality was absent from a batch and the dummy loss is "
                    "off; set dummy_loss.enabled: true"
                ) from error
            raise
        if self.accelerator.sync_gradients:
            self._close_window()
        assert self._task_loss is not None
        return self._task_loss

    def _close_window(self) -> None:
        is_logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        facts = self._window.close(
            is_stop_asked=self._stop.is_asked, norms=self._local_squared_norms() if is_logged else None
        )
        self._stop.is_agreed = facts.is_stop_asked
        if not facts.is_finite:
            raise NonFiniteError(self._describe_non_finite())
        if self.dummy_loss_config.absent == "hold":
            self.gradients.clear([name for name in self.gradients.modalities if name not in facts.present])
        if is_logged:
            self._gradient_log = self._name_norms(facts)

    def _local_squared_norms(self) -> Tensor:
        norms = self.gradients.squared_norms()
        # Replicated gradients are equal on all ranks: one rank speaks for all, so that the sum is exact.
        if self.args.process_index and not self.gradients.is_sharded:
            norms = torch.zeros_like(norms)
        return norms

    def _name_norms(self, facts: WindowFacts) -> dict[str, float]:
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        named = {}
        for index, modality in enumerate(self.gradients.modalities):
            keys = self.gradients.keys(modality, is_active=modality in facts.present)
            for key, square in zip(keys, facts.norms[2 * index : 2 * index + 2], strict=True):
                named[key] = math.sqrt(square) / scale
        return named

    def _describe_non_finite(self) -> str:
        step = self.state.global_step + 1
        for name, parameter in self._unwrapped().named_parameters():
            if not bool(parameter.detach().isfinite().all()):
                return f"step {step}: parameter {name} is not finite; no step was taken with it"
        return (
            f"step {step}: the loss is not finite though all parameters are; look at the learning rate, the precision "
            "and the samples of this step"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the gradient norms to the line of the training loss."""
        if "loss" in logs and self._gradient_log:
            logs = {**logs, **self._gradient_log}
            self._gradient_log = {}
        super().log(logs, start_time)

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch of any mixture; no dummy term is part of them."""
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
        total = EvaluationLoss(self.gradients.modalities, device=self.args.device)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs)
            total.add(outputs.loss, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics, num_samples = total.reduce(prefix=metric_key_prefix)
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=num_samples)

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes safetensors, configs and the processor; Hugging Face's pickled arguments are left out."""
        target = Path(output_dir or self._run_folder())
        target.mkdir(parents=True, exist_ok=True)
        self._unwrapped().save_pretrained(target, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            seal_checkpoint(self._run_folder() / f"checkpoint-{self.state.global_step}")

    def _run_folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)
