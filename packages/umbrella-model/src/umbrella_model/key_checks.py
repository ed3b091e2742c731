"""Whether a checkpoint held exactly the keys of the model, and who says so."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_report() -> Iterator[None]:
    """Mutes transformers' report of keys: it says "can be ignored" of what `check_loaded_keys` refuses next."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def check_loaded_keys(info: Mapping[str, Collection[Any]], *, source: str) -> None:
    """Refuses a checkpoint whose keys are not those of the model.

    Args:
        info: The account that Hugging Face's `from_pretrained(..., output_loading_info=True)` returns.
        source: Where the checkpoint came from, for the message.

    Raises:
        ValueError: A key is missing, unexpected or of another shape; all of them are named.
    """
    lines = [
        *(f"  the model has and the checkpoint has not: {key}" for key in sorted(info.get("missing_keys", ()))),
        *(f"  the checkpoint has and the model has not: {key}" for key in sorted(info.get("unexpected_keys", ()))),
        *(
            f"  has another shape in the checkpoint: {key}: {tuple(theirs)} instead of {tuple(ours)}"
            for key, theirs, ours in sorted(info.get("mismatched_keys", ()))
        ),
    ]
    if lines:
        raise ValueError(
            f"{source}: {len(lines)} keys do not match the model (strict=False loads what matches and starts the rest "
            "anew):\n" + "\n".join(lines)
        )
