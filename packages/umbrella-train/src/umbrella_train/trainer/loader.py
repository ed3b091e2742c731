"""Data loaders over rank-aware batch samplers; accelerate does not shard them again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.utils.data import DataLoader
from transformers import TrainingArguments

from umbrella_data import ManifestError, ModalityBatchSampler
from umbrella_train.errors import RunError
from umbrella_train.stop_signals import end_workers_at_exit, leave_signals_to_parent


class EpochDataLoader(DataLoader[Any]):
    """A `DataLoader` that passes the epoch to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Hugging Face's Trainer at the start of every epoch."""
        assert isinstance(self.batch_sampler, ModalityBatchSampler)
        self.batch_sampler.set_epoch(epoch)


def build_loader(
    dataset: Any,
    *,
    collate: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    mode: Literal["by_modality", "mixed", "by_length"],
    seed: int,
    rank: int,
    world_size: int,
    shuffle: bool,
    max_tokens: int | None = None,
    padded: bool = True,
    num_epochs: int | None = None,
    num_batches: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EpochDataLoader:
    """A loader of this rank's batches; other arguments are those of `ModalityBatchSampler` and `DataLoader`.

    A batch has one set of modalities, any, or any of similar length (`mode`). For training (`shuffle`), batches are in
    random order, and may have a token budget, `max_tokens`, which counts padding unless `collate` packs. They are
    planned for `num_epochs`, or if that is None for `num_batches`.

    Returns:
        The loader; its length is the same on every rank.

    Raises:
        RunError: The samples cannot be distributed like that: one exceeds the budget, or there are too few.
    """
    if shuffle:
        make = partial(
            ModalityBatchSampler,
            dataset,
            batch_size=batch_size if max_tokens is None else None,
            mode="by_modality" if mode == "by_modality" else "mixed",
            by_length=mode == "by_length",
            max_tokens=max_tokens,
            padded=padded,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        sampler = _plan(make, num_epochs=num_epochs, num_batches=None if max_tokens is None else num_batches)
    else:
        sampler = evaluation_batches(dataset, batch_size=batch_size, mode=mode, rank=rank, world_size=world_size)
    if num_workers:
        end_workers_at_exit()
    return EpochDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
    )


def loader_settings(arguments: TrainingArguments) -> dict[str, Any]:
    """The arguments of `build_loader` that Hugging Face's training arguments have."""
    return {
        "seed": arguments.seed,
        "rank": arguments.process_index,
        "world_size": arguments.world_size,
        "num_epochs": math.ceil(arguments.num_train_epochs) if arguments.max_steps <= 0 else None,
        "num_batches": arguments.max_steps * arguments.gradient_accumulation_steps,
        "num_workers": arguments.dataloader_num_workers,
        "pin_memory": arguments.dataloader_pin_memory and arguments.device.type == "cuda",
    }


def evaluation_batches(
    dataset: Any, *, batch_size: int, mode: Literal["by_modality", "mixed", "by_length"], rank: int, world_size: int
) -> ModalityBatchSampler:
    """A rank's batches of the evaluation loss, in order, each sample exactly once; arguments as of `build_loader`.

    Raises:
        RunError: There are fewer samples than ranks.
    """
    if len(dataset) < world_size:
        raise RunError(
            f"data.evaluation: {len(dataset)} samples cannot give each of {world_size} ranks a batch; name more, use "
            "fewer ranks, or leave out trainer.eval_steps: the scores at the end of a run do with any number"
        )
    make = partial(ModalityBatchSampler, dataset, rank=rank, world_size=world_size, shuffle=False)
    if mode != "by_modality":
        return make(batch_size=batch_size, mode="mixed", by_length=mode == "by_length")
    try:
        return make(batch_size=batch_size, mode="by_modality")
    except ManifestError:
        raise
    except ValueError:
        # Too few samples per set of modalities: batches of one sample, where possible, keep the loss of each set
        # separate.
        return make(batch_size=1, mode="mixed")


def _plan(
    make: Callable[..., ModalityBatchSampler], *, num_epochs: int | None, num_batches: int | None
) -> ModalityBatchSampler:
    """Batches for a number of epochs, or for as many as the number of batches needs."""
    try:
        if num_epochs is None and num_batches is not None:
            # A single epoch may have fewer batches than each of several.
            num_epochs = math.ceil(num_batches / len(make(num_epochs=1)))
        return make(num_epochs=num_epochs)
    except ManifestError:
        raise
    except ValueError as error:
        raise RunError(f"data.batches, data.max_tokens_per_batch: {error}") from error
