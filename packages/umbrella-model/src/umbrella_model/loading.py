"""Whether a checkpoint held exactly the keys of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


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
