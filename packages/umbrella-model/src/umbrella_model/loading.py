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
    lines = []
    for kind, meaning in (
        ("missing_keys", "the model has and the checkpoint has not"),
        ("unexpected_keys", "the checkpoint has and the model has not"),
        ("mismatched_keys", "have another shape in the checkpoint"),
    ):
        keys = sorted(str(key) for key in info.get(kind, ()))
        lines += [f"  {meaning}: {key}" for key in keys]
    if lines:
        raise ValueError(
            f"{source}: {len(lines)} keys do not match the model (strict=False loads what matches and starts the rest "
            "anew):\n" + "\n".join(lines)
        )
