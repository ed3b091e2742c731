"""What our own parts keep in a checkpoint's trainer_state.json, by name."""

from __future__ import annotations

from typing import Any, cast

from transformers import TrainerState


def kept_states(state: TrainerState) -> dict[str, Any]:
    """The table that Hugging Face's Trainer writes with a checkpoint and reads again; it annotates it as a list."""
    return cast(dict[str, Any], state.stateful_callbacks)
