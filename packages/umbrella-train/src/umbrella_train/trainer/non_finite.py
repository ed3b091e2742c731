"""Losses and gradients that are not finite: names the samples, and stops the run or skips the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from umbrella_data.batch.example import SampleOrigin
from umbrella_data.privacy import pseudonyms
from umbrella_train.batches.collators import NamedBatch
from umbrella_train.batches.sample_losses import sample_losses
from umbrella_train.checkpoint.logged_loss import trainer_state_entries
from umbrella_train.distributed.finite import NonFiniteError, describe_non_finite
from umbrella_train.distributed.ranks import from_all_ranks, is_first_rank
from umbrella_train.hf_compat import leave_step_out_of_means, losses_since_log, on_device
from umbrella_train.run_folder import append_line, read_lines
from umbrella_train.trainer.callbacks import seed_step

logger = logging.getLogger(__name__)

LIST_NAME = "non_finite.jsonl"
"""File of a run's folder with the samples of steps and evaluations whose loss or gradient was not finite."""

SampleLosses = list[tuple[SampleOrigin | str, float]]
"""Samples, and the mean loss of each over its own supervised tokens."""

_NUM_SKIPPED = "num_skipped_steps"
_MAX_NAMED = 50
_MAX_BATCHES = 8  # of an evaluation, whose losses are computed once more


class NonFiniteSteps(TrainerCallback):
    """Stops a run at a loss or gradient that is not finite, or skips the step; either way the samples are named.

    A skipped step changes neither parameters nor moments, and counts for the number of steps and for the schedule. The
    number of skipped steps is saved in checkpoints.

    Args:
        trainer: The trainer.
        action: `stop` or `skip`.
        max_skipped: Steps that may be skipped in the whole run.

    Attributes:
        folder: Where the samples are listed by hash; None for nowhere.
    """

    folder: Path | None = None

    def __init__(self, trainer: Trainer, *, action: Literal["stop", "skip"], max_skipped: int) -> None:
        self._trainer: Any = trainer
        self._action = action
        self._max_skipped = max_skipped
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._total_before: Tensor | None = None
        self._skipped_step: int | None = None

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped in this run, before and after a resume."""
        return int(trainer_state_entries(self._trainer.state).get(_NUM_SKIPPED, 0))

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the batches of an accumulation window until it ends; they are still on the host."""
        self._batches = batches
        self._total_before = losses_since_log(self._trainer)[0].clone()

    def handle(self, *, is_loss_finite: bool) -> None:
        """Names the samples of the window, and clears all gradients if the step is skipped; a collective.

        Args:
            is_loss_finite: Whether every loss of the window was finite on all ranks.

        Raises:
            NonFiniteError: On every rank, if the step is not skipped, or if a parameter is not finite.
        """
        trainer = self._trainer
        step = trainer.state.global_step + 1
        model = trainer.accelerator.unwrap_model(trainer.model)
        message = describe_non_finite(model, step=step, is_loss_finite=is_loss_finite)
        samples = from_all_ranks(self._window_losses())
        is_skipped = self._action == "skip" and self.num_skipped < self._max_skipped
        self._list(samples, step=step, event="skipped" if is_skipped else "stopped")
        message += describe_samples(samples)
        if not is_skipped:
            if self._action == "skip":
                message += (
                    f"\n{self.num_skipped} steps were skipped before, as many as trainer.max_skipped_steps allows"
                )
            raise NonFiniteError(message)
        # Optimizers leave parameters without a gradient unchanged, with their moments and weight decay.
        for parameter in model.parameters():
            parameter.grad = None
        assert self._total_before is not None
        leave_step_out_of_means(trainer, total_before=self._total_before)
        trainer_state_entries(trainer.state)[_NUM_SKIPPED] = self.num_skipped + 1
        self._skipped_step = step
        if is_first_rank():
            logger.warning("skipped (%d of at most %d): %s", self.num_skipped, self._max_skipped, message)

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Called by the Trainer. A skipped step has its own line in the log, since it has no loss."""
        self._batches = ()
        trainer = self._trainer
        if trainer.state.global_step == self._skipped_step:
            is_loss_due = trainer.control.should_log
            trainer.log({"non_finite/skipped": self.num_skipped})
            trainer.control.should_log = is_loss_due

    def add_counts(self, logs: dict[str, float]) -> dict[str, float]:
        """Adds the numbers of skipped steps to a line with a training loss."""
        if "loss" not in logs:
            return logs
        trainer = self._trainer
        if trainer.state.global_step == self._skipped_step:
            logs = {key: value for key, value in logs.items() if key != "grad_norm"}
        # DeepSpeed skips the steps whose gradients overflow its loss scale.
        by_deepspeed = trainer.deepspeed.skipped_steps if trainer.is_deepspeed_enabled else 0
        counts = {"non_finite/skipped": self.num_skipped, "non_finite/skipped_by_deepspeed": by_deepspeed}
        return logs | {key: count for key, count in counts.items() if count}

    def warn_of_evaluation(self, model: nn.Module, loader: DataLoader[Any], is_bad: Sequence[Tensor]) -> None:
        """Logs a warning with the samples of an evaluation whose loss is not finite; a collective.

        Args:
            model: As it was evaluated.
            loader: Of the evaluation; the batches in question are read again.
            is_bad: For each batch whether its loss is not finite, 0-dim tensors on the device.
        """
        shared = torch.stack(list(is_bad)).int()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        numbers: list[int] = shared.nonzero().flatten().tolist()
        if not numbers:
            return
        indices = list(loader.batch_sampler or ())
        dataset, collate = loader.dataset, loader.collate_fn
        # Every rank computes as many losses, for the collectives of sharded models.
        batches = (collate([dataset[index] for index in indices[number]]) for number in numbers[:_MAX_BATCHES])
        samples = from_all_ranks([pair for batch in batches for pair in self._losses(model, batch)])
        step = self._trainer.state.global_step
        self._list(samples, step=step, event="evaluation")
        if is_first_rank():
            among = f" (of the first {_MAX_BATCHES} of {len(numbers)} batches)" if len(numbers) > _MAX_BATCHES else ""
            words = f"step {step}: the evaluation loss is not finite{among}"
            logger.warning("%s%s", words, describe_samples(samples))

    def _window_losses(self) -> SampleLosses:
        """Losses of this rank's samples, with the dropout of the step; the random state is restored."""
        trainer = self._trainer
        device = trainer.args.device
        model = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.accelerator.unwrap_model(trainer.model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_step(trainer.args, trainer.state)
            return [pair for batch in self._batches for pair in self._losses(model, batch)]

    def _losses(self, model: nn.Module, batch: Mapping[str, Any]) -> SampleLosses:
        losses = sample_losses(model, batch, on_device(self._trainer, batch))
        named = batch.samples if isinstance(batch, NamedBatch) else ()
        names = named or [
            f"sample {number} of a batch of rank {self._trainer.args.process_index}" for number in range(len(losses))
        ]
        return list(zip(names, losses, strict=True))

    def _list(self, samples: SampleLosses, *, step: int, event: str) -> None:
        """Appends the samples in question to the list; a resumed run finds those of repeated steps in it."""
        if self.folder is None or not is_first_rank():
            return
        path, name_hash = self.folder / LIST_NAME, pseudonyms(self.folder)
        known, _ = read_lines(path)
        for origin, loss in _in_question(samples):
            names: dict[str, Any] = {"sample": origin} if isinstance(origin, str) else asdict(origin)
            for key in names.keys() & {"manifest", "subject"}:
                names[key] = name_hash(names[key])
            row = {"step": step, "event": event, **names, "loss": loss if math.isfinite(loss) else None}
            if row not in known:
                append_line(path, row)


def describe_samples(samples: SampleLosses) -> str:
    """Lines with the samples whose own loss is not finite, or with all if each is finite by itself."""
    chosen = _in_question(samples)
    is_named = any(not math.isfinite(loss) for _, loss in chosen)
    return "\n".join(["", *_lines(chosen, num_all=len(samples), is_named=is_named)])


def _lines(chosen: SampleLosses, *, num_all: int, is_named: bool) -> Iterator[str]:
    if is_named:
        yield f"  the loss of {len(chosen)} of {num_all} samples is not finite:"
    else:
        yield f"  the loss of each of the {num_all} samples is finite by itself; all are candidates:"
    for origin, loss in chosen[:_MAX_NAMED]:
        yield f"    {origin}: loss {loss:.4g}"
    if len(chosen) > _MAX_NAMED:
        yield f"    and {len(chosen) - _MAX_NAMED} more"


def _in_question(samples: SampleLosses) -> SampleLosses:
    return [(origin, loss) for origin, loss in samples if not math.isfinite(loss)] or samples
