"""Activation (gradient) checkpointing of selected parts of a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CheckpointedPart = Literal["vision_tower", "language_model"]


def checkpoint_parts(model: PreTrainedModel, parts: CheckpointedPart | Collection[CheckpointedPart]) -> None:
    """Enables activation checkpointing for the layers of these parts, and disables it for the others.

    Args:
        model: The model; changed in place.
        parts: `vision_tower`, `language_model`, or a list of both or none.

    Raises:
        ValueError: A part does not support checkpointing.
    """
    if isinstance(parts, str):
        parts = (parts,)
    unknown = sorted(set(parts) - set(get_args(CheckpointedPart)))
    if unknown:
        raise ValueError(f"cannot checkpoint {', '.join(unknown)}; use {', '.join(get_args(CheckpointedPart))}")
    # Newer versions of transformers rename the method.
    newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable: Any = getattr(model, newer if hasattr(model, newer) else older)
    enable({"use_reentrant": False})
    roots = {"vision_tower": model.model.vision_tower, "language_model": model.model.language_model}
    for part, root in roots.items():
        for module in root.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = part in parts
