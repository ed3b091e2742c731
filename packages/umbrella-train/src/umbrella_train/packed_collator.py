"""Batches without padding: the conversations of each lie end to end in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from umbrella_model import pack_batch


class PackedCollator:
    """Collates as another collator does, then packs.

    Args:
        collate: Examples to a padded batch, as `PaddingCollator`.
    """

    def __init__(self, collate: Callable[[Any], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Collate examples.

        Returns:
            What `pack_batch` makes of the padded batch.
        """
        return pack_batch(self._collate(examples))  # as they come: their type says where the scans lie
