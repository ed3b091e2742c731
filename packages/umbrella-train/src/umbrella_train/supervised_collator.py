"""Batches that say on the host which positions carry loss, so that a GPU need not be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umbrella_data import PaddingCollator
from umbrella_data.example import Example
from umbrella_model import supervised_index


class SupervisedCollator(PaddingCollator):
    """The collator of training and of the evaluation loss; its arguments are those of `PaddingCollator`.

    The data know nothing of the model that takes the index: it is added here, in the loader's own process.
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate examples.

        Returns:
            The batch of `PaddingCollator` with `supervised_index`, (K,) int64: the model computes logits at these
            positions of the flattened (B * L) alone.
        """
        batch = super().__call__(examples)
        return {**batch, "supervised_index": supervised_index(batch["labels"])}
