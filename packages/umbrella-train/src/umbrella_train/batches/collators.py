"""Collators of training: supervised positions, packed rows, names of samples, the conversation of a position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from umbrella_data import PaddingCollator
from umbrella_data.batch.example import Example, SampleOrigin
from umbrella_model import pack_batch, supervised_index


class SupervisedCollator(PaddingCollator):
    """The collator of training and of the evaluation loss; its arguments are those of `PaddingCollator`.

    umbrella_data does not know the model that uses the index, so it is added here, in the loader process.
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Returns:
            The batch of `PaddingCollator` with `supervised_index`, (K,) int64: positions of the flattened (B * L) at
            which the model computes logits.
        """
        batch = super().__call__(examples)
        return {**batch, "supervised_index": supervised_index(batch["labels"])}


def num_conversations(batch: Mapping[str, Any]) -> int:
    """Number of conversations of a batch with labels, padded or packed."""
    ends = batch.get("cu_seq_lens_q")
    return len(batch["labels"]) if ends is None else len(ends) - 1


def conversation_index(batch: Mapping[str, Any]) -> Tensor:
    """The number of the conversation at each position.

    Args:
        batch: From `PaddingCollator`, or packed, still on the host.

    Returns:
        int64 of the shape of `labels`.
    """
    labels, ends = batch["labels"], batch.get("cu_seq_lens_q")
    if ends is None:
        return torch.arange(len(labels)).unsqueeze(1).expand_as(labels)
    return torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()).unsqueeze(0)


class PackedCollator:
    """Collates as another collator does, to a padded batch, then packs."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Collate examples.

        Returns:
            The padded batch, packed by `pack_batch`.
        """
        return pack_batch(self._collate(examples))


class NamedBatch(dict[str, Any]):
    """A batch on the host that names its samples; its copy on the device, which the model receives, does not.

    Attributes:
        samples: The origin of each sample in the order of the batch, or its index in the data set as text.
    """

    samples: tuple[SampleOrigin | str, ...] = ()


class NamedCollator:
    """Collates as another collator does, and adds the names of the samples.

    Args:
        collate: Examples to a batch, padded or packed.
    """

    def __init__(self, collate: Callable[[Any], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Any]) -> NamedBatch:
        """Collate examples.

        Returns:
            The batch, with an attribute `samples`.
        """
        batch = NamedBatch(self._collate(examples))
        batch.samples = tuple(
            example.origin if example.origin is not None else f"sample {example.index}" for example in examples
        )
        return batch
