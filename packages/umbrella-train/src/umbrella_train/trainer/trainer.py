"""`UmbrellaTrainer`: Hugging Face's Trainer with the dummy loss, the gradient log and the loss of each modality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, optimization
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from umbrella_model import parameter_groups
from umbrella_model.parts import Part
from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.batches.collators import NamedCollator, PackedCollator
from umbrella_train.config import DummyLossConfig
from umbrella_train.distributed.adafactor import Adafactor
from umbrella_train.distributed.deepspeed import call_before_step
from umbrella_train.distributed.finite import has_bad_gradient
from umbrella_train.distributed.fsdp2 import load_whole_state, shard_model
from umbrella_train.distributed.rank_watch import RankWatch
from umbrella_train.distributed.tensors import full
from umbrella_train.dummy_loss.loss import DummyLoss
from umbrella_train.errors import RunError
from umbrella_train.hf_compat import mark_as_prepared
from umbrella_train.stop_signals import StopSignals
from umbrella_train.trainer.accumulation import AccumulationWindow
from umbrella_train.trainer.arguments import on_one_device
from umbrella_train.trainer.callbacks import RankParity, StepSeed, StopOnSignal
from umbrella_train.trainer.checkpoints import Checkpoints
from umbrella_train.trainer.evaluation_loss import evaluation_loss
from umbrella_train.trainer.loader import build_loader, loader_settings
from umbrella_train.trainer.non_finite import NonFiniteSteps
from umbrella_train.trainer.patch_embed_log import PatchEmbedLog
from umbrella_train.trainer.unsupported import ABSENT_WITHOUT_DUMMY_LOSS, check_trainer


class UmbrellaTrainer(Trainer):
    """Trains an UMBRELLA model on batches of any mixture of modalities.

    Args:
        model: The model, not wrapped.
        args: Hugging Face's training arguments, which are copied.
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
        watch: Of the other ranks.
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
        watch: RankWatch | None = None,
        **kwargs: Any,
    ) -> None:
        self.dummy_loss_config = dummy_loss = dummy_loss or DummyLossConfig()
        check_trainer(
            model,
            args,
            dummy_loss=dummy_loss,
            batches=batches,
            engine=engine,
            gradient_scale=gradient_scale,
            packing=packing,
            on_non_finite=on_non_finite,
            has_metrics=kwargs.get("compute_metrics") is not None,
        )
        self.batches = batches
        self.max_tokens_per_batch = max_tokens_per_batch
        self.packing = packing
        self.gradient_scale = gradient_scale
        self.part_learning_rates = part_learning_rates or {}
        tower = next(module for module in model.modules() if isinstance(module, UmbrellaVisionTower))
        self.patch_embeds = PatchEmbedLog(tower, under_zero=args.deepspeed_plugin is not None)
        layout = {"batches": batches, "max_tokens_per_batch": max_tokens_per_batch}
        if max_tokens_per_batch is not None:
            layout["packing"] = packing  # the budget then counts no padding
        self.checkpoints = Checkpoints(self, args, patch_embeds=self.patch_embeds, layout=layout)
        # Before other callbacks, which may use a checkpoint.
        callbacks = [self.patch_embeds, self.checkpoints, *(kwargs.pop("callbacks", None) or ())]
        super().__init__(model, on_one_device(args), callbacks=callbacks, **kwargs)
        # Hugging Face's Trainer writes weights and its own state, and removes nothing: the rest is in `Checkpoints`.
        self.args.save_only_model, self.args.save_total_limit = True, None
        if packing:
            self.data_collator = PackedCollator(self.data_collator)
        self.data_collator = NamedCollator(self.data_collator)
        sizes = self._unwrapped().dummy_sizes() if dummy_loss.reduction == "sum" else {}
        self.dummy_loss = DummyLoss(scale=dummy_loss.scale, reduction=dummy_loss.reduction, sizes=sizes)
        if engine == "fsdp2":
            shard_model(model, device=self.args.device)
            # In evaluation mode accelerate adds autocast and does not wrap the model.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            mark_as_prepared(model)
        self.modality_order = tower.modality_order
        self._window = AccumulationWindow(self.modality_order)
        self._task_loss: Tensor
        self.signals = signals or StopSignals()
        self._stop = StopOnSignal(self.signals)
        self.non_finite = NonFiniteSteps(self, action=on_non_finite, max_skipped=max_skipped_steps)
        self._watch = watch
        for callback in filter(None, (self._stop, StepSeed(), RankParity(parity_every), self.non_finite, watch)):
            self.add_callback(callback)

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
        """This rank's share of the evaluation samples, of a data set or the one of this name, each exactly once."""
        dataset: Any = self.eval_dataset
        if eval_dataset is not None:
            dataset = dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self._build_loader(dataset, self.args.eval_batch_size, shuffle=False)

    def _build_loader(self, dataset: Any, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        return build_loader(
            dataset,
            collate=self.data_collator,
            batch_size=batch_size,
            mode=self.batches,
            shuffle=shuffle,
            max_tokens=self.max_tokens_per_batch if shuffle else None,
            padded=not self.packing,
            **loader_settings(self.args),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetches one accumulation window, and records its modalities while the batches are still on the host."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            # Resumed from its last step: Hugging Face looks at the number of steps only after one more.
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(map(self._see, epoch_iterator), num_batches, device)
        self.non_finite.begin(batches)
        return batches, num_items

    def _see(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._window.see(batch)
        if self._watch is not None:
            self._watch.has_read_batch()
        return batch

    # ---- optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Hugging Face's choice, with an Adafactor that also steps sharded parameters."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return Adafactor if kind is optimization.Adafactor else kind, options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Hugging Face's optimizer, with parameter groups by learning rate if parts have their own."""
        if self.optimizer is None and self.part_learning_rates:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self._unwrapped())
            rates, decay = self.part_learning_rates, self.args.weight_decay
            groups = parameter_groups(
                self._unwrapped(), learning_rate=self.args.learning_rate, part_learning_rates=rates, weight_decay=decay
            )
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    # ---- one step, in this order: loss, backward, facts, checks, gradients, drift, log ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
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
            NonFiniteError: Before a step with a loss, gradient or parameter that is not finite, unless it is skipped.
            RunError: A modality was absent under DDP with the dummy loss off.
        """
        if self.is_deepspeed_enabled:
            call_before_step(self.deepspeed, self._before_optimizer_step)
        try:
            super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error) and not self.dummy_loss_config.enabled:
                raise RunError(ABSENT_WITHOUT_DUMMY_LOSS) from error
            raise
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._before_optimizer_step()
        return self._task_loss

    def _before_optimizer_step(self) -> None:
        """Shares the facts of the accumulation window between ranks, then checks, scales and clears gradients."""
        is_logged = self.patch_embeds.is_needed(self.args, self.state)
        scaler = self.accelerator.scaler
        # A loss scaler checks gradients itself, skips such a step and reduces its scale.
        is_checked = scaler is None or not scaler.is_enabled()
        facts = self._window.close(
            is_stop_asked=self.signals.is_asked,
            has_bad_gradient=has_bad_gradient(self._unwrapped()) if is_checked else None,
            norms=self.patch_embeds.squared_norms() if is_logged else None,
        )
        self._stop.is_agreed = facts.is_stop_asked
        if not (facts.is_loss_finite and facts.is_gradient_finite):
            self.non_finite.handle(is_loss_finite=facts.is_loss_finite)
            self._task_loss = torch.zeros((), device=self.args.device)
            return
        gradients, factors = self.patch_embeds.gradients, {}
        if self.gradient_scale == "present":
            factors = {name: facts.num_tokens / tokens for name, tokens in facts.tokens_with.items() if tokens}
            gradients.scale(factors)
        if self.dummy_loss_config.absent == "hold":
            gradients.clear([name for name in self.modality_order if name not in facts.present])
        self.patch_embeds.drift.before_step(facts.present, step=self.state.global_step)
        if is_logged:
            self.patch_embeds.keep(facts, factors=factors, scaler=scaler)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm as Hugging Face's Trainer logs it, unsharded; there is no hook for it."""
        return full(super()._get_grad_norm(model, grad_norm=grad_norm))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the gradient norm of each patch embed, its share of the total norm and its drift to the logged line."""
        if "train_runtime" in logs and self.stopped_by is not None:
            return  # of a part of the run
        logs = self.non_finite.add_counts(logs)
        if "loss" in logs:
            total = float(logs.get("grad_norm") or 0.0)
            logs = logs | self.patch_embeds.take(total, step=self.state.global_step)
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The evaluation loss, overall and for each set of modalities, of each data set.

        During a training, a due checkpoint is saved first: an unreadable held-out scan must not lose the steps before.
        A signal then raises `RunStoppedError`, after the checkpoint of this step was saved.
        """
        with self.checkpoints.saved_around_evaluation(self.signals):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The sums of `evaluation_loss`, without logits."""
        parts: dict[str, Any] = {"signals": self.signals, "non_finite": self.non_finite, "prefix": metric_key_prefix}
        return evaluation_loss(self, dataloader, modalities=self.modality_order, **parts)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of one batch of any mixture, without dummy terms."""
        if not prediction_loss_only:  # logits at all positions are requested
            inputs = {key: value for key, value in inputs.items() if key != "supervised_index"}
        ignore_keys = [*(ignore_keys or ["past_key_values"]), "dummy_terms"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def predict(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not supported: logits of batches of different lengths and modalities do not form an array."""
        raise RunError("predict is not supported; use umbrella-eval or umbrella-predict")

    # ---- checkpoints: see also `Checkpoints` ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint if one is given; True: from the newest valid one of the output folder.

        The last checkpoint is valid afterwards. A `RunError` says why a checkpoint cannot be resumed from.
        """
        checkpoint = self.checkpoints.choose(resume_from_checkpoint)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # also after an error
            self.checkpoints.wait()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the unsharded model as safetensors, if it is finite, and the processor; every rank must call it.

        Raises:
            NonFiniteError: A parameter is NaN or infinite. Its checkpoint would be the newest, but unusable.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        self.checkpoints.write_model(folder, is_checkpoint=_internal_call and output_dir is not None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights, also into shards; Hugging Face's Trainer would only warn of missing and other keys."""
        target = self._unwrapped() if model is None else model
        load_whole_state(target, sorted(Path(resume_from_checkpoint).glob("model*.safetensors")))

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)
