"""Checks that a checkpoint has exactly the tensors of the model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def mute_load_report() -> Iterator[None]:
    """Mutes transformers' report on keys, which says "can be ignored" of keys that `check_loaded_keys` rejects."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def check_loaded_keys(
    info: Mapping[str, Collection[Any]],
    *,
    source: str,
    advice: str = "use strict=False to load those that match and initialise the rest",
) -> None:
    """Rejects a checkpoint whose keys are not those of the model.

    Args:
        info: The loading info that Hugging Face's `from_pretrained(..., output_loading_info=True)` returns.
        source: Path or name of the checkpoint, for the message.
        advice: What to do, for the message.

    Raises:
        ValueError: A key is missing, unexpected or has another shape; the message lists all of them.
    """
    lines = [
        *(f"  missing in the checkpoint: {key}" for key in sorted(info.get("missing_keys", ()))),
        *(f"  not in the model: {key}" for key in sorted(info.get("unexpected_keys", ()))),
        *(
            f"  shape mismatch: {key} is {tuple(theirs)} in the checkpoint and {tuple(ours)} in the model"
            for key, theirs, ours in sorted(info.get("mismatched_keys", ()))
        ),
    ]
    if lines:
        raise ValueError(f"{source}: {len(lines)} keys do not match the model; {advice}:\n" + "\n".join(lines))
