"""What `generate` refuses, because it would decode something else than what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Options of Hugging Face's `generate` that run the model, or a second one, on token ids without the scans.
_BLIND_OPTIONS: Mapping[str, str] = {
    "assistant_model": "the assistant would not see the scans",
    "prompt_lookup_num_tokens": "assisted decoding is not supported with scans",
    "guidance_scale": "the unguided forward would not see the scans",
    "negative_prompt_ids": "the unguided forward would not see the scans",
    "past_key_values": "the scans are encoded with the whole conversation; leave the cache to generate",
    "inputs_embeds": "give input_ids, modality_ids and pixel_values",
}


def check_generation(input_ids: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any]) -> None:
    """Refuses padding on the right, padding that no mask tells, and options that do not work with scans.

    Args:
        input_ids: Shape (B, L).
        attention_mask: Shape (B, L), or None.
        options: For Hugging Face's `generate`, whose `generation_config` may hold options too.

    Raises:
        ValueError: With what is wrong, and what would be right.
    """
    config = options.get("generation_config")
    for name, reason in _BLIND_OPTIONS.items():
        if options.get(name) is not None or getattr(config, name, None) is not None:
            raise ValueError(f"generate does not take {name}: {reason}")
    if attention_mask is None:
        if len(input_ids) > 1:
            raise ValueError("a batch of several prompts needs its attention_mask: padding cannot be told without it")
        return
    if not bool(attention_mask[:, -1].all()):
        raise ValueError('prompts must be padded on the left: padding_side="left"')
