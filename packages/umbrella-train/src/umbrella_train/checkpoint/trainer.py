"""A Hugging Face Trainer with checkpoints of safetensors and JSON for every engine, and an integrity manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from umbrella_train.checkpoint.changes import write_record
from umbrella_train.checkpoint.integrity import remove_old_checkpoints, write_integrity_manifest
from umbrella_train.checkpoint.logged_loss import LossSinceLog
from umbrella_train.checkpoint.training_state import load_training_state, save_training_state
from umbrella_train.distributed.finite import check_finite
from umbrella_train.distributed.fsdp2 import is_sharded_model, load_whole_state, whole_state_dict
from umbrella_train.stop_signals import without_worker_failures

logger = logging.getLogger(__name__)


class WholeCheckpointTrainer(Trainer):
    """Replaces what Hugging Face's Trainer pickles; loading is exact or an error.

    No random state is saved: a step's generator is seeded from (seed, step, rank), a sample's from its index.

    Attributes:
        run_record: Returns what a checkpoint records of its run, for `read_record`.
        saved_step: The step of the newest checkpoint that this trainer saved.
    """

    run_record: Callable[[], Mapping[str, Any]]
    saved_step: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_record = dict
        self._losses = LossSinceLog(self)
        self.add_callback(self._losses)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the unsharded model, if it is finite; every rank must call it.

        Raises:
            NonFiniteError: A parameter is NaN or infinite. Its checkpoint would be the newest, but unusable.
        """
        check_finite(self._unwrapped(), step=self.state.global_step)
        if self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = None
        if is_sharded_model(self._unwrapped()):
            state = whole_state_dict(self._unwrapped(), keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes safetensors, configs and the processor, without Hugging Face's pickled arguments."""
        target = Path(output_dir or self._run_folder())
        target.mkdir(parents=True, exist_ok=True)
        self._unwrapped().save_pretrained(target, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, then its integrity manifest; older checkpoints are removed only then."""
        self._losses.keep()
        folder = self._run_folder() / f"checkpoint-{self.state.global_step}"
        with without_worker_failures():
            with self._leaving_the_rest():
                super()._save_checkpoint(model, trial)
            self.save_training_state(folder)
            if dist.is_initialized():
                dist.barrier()
            if self.args.should_save:
                self._finish_checkpoint(folder)
        self.saved_step = self.state.global_step

    @contextmanager
    def _leaving_the_rest(self) -> Iterator[None]:
        """Hugging Face's Trainer saves weights and its own state; it pickles nothing and removes no checkpoint."""
        before = self.args.save_only_model, self.args.save_total_limit
        self.args.save_only_model, self.args.save_total_limit = True, None
        try:
            yield
        finally:
            self.args.save_only_model, self.args.save_total_limit = before

    def _finish_checkpoint(self, folder: Path) -> None:
        write_record(folder, self.run_record())
        write_integrity_manifest(folder)
        best = self.state.best_model_checkpoint
        limit = self.args.save_total_limit
        remove_old_checkpoints(folder.parent, keep=limit, best=None if best is None else Path(best))

    def save_training_state(self, folder: Path) -> None:
        """Writes optimizer, schedule and scaler; every rank must call it. DeepSpeed writes its own format."""
        if self.is_deepspeed_enabled:
            self._save_optimizer_and_scheduler(str(folder))
            return
        assert self.optimizer is not None
        save_training_state(
            folder,
            model=self._unwrapped(),
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=self.accelerator.scaler,
            layout=self._layout(),
            is_writer=self.args.should_save,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            if self.args.process_index == 0:
                logger.warning(
                    "%s: DeepSpeed keeps the learning rate and other optimizer settings of its checkpoint and ignores "
                    "those of the config",
                    Path(checkpoint).name,
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        load_training_state(
            Path(checkpoint),
            model=self._unwrapped(),
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=self.accelerator.scaler,
            layout=self._layout(),
            num_steps=self.state.global_step,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights; missing and unexpected keys are errors (Hugging Face's Trainer warns)."""
        target = self._unwrapped() if model is None else model
        load_whole_state(target, sorted(Path(resume_from_checkpoint).glob("model*.safetensors")))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Part of the training state."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """No random state is saved."""

    def _layout(self) -> dict[str, Any]:
        return {
            "seed": self.args.seed,
            "ranks": self.args.world_size,
            "batch": self.args.per_device_train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
        }

    def _run_folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)
