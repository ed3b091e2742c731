"""What `generate` refuses, because it would decode something else than what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Options of Hugging Face's `generate` that run the model, or a second one, on token ids without the scans.
_BLIND_OPTIONS: Mapping[str, str] = {
    "assistant_model": "the assistant would not see the scans",
    "assistant_early_exit": "assisted decoding is not supported with scans",
    "prompt_lookup_num_tokens": "assisted decoding is not supported with scans",
    "prefill_chunk_size": "the scans come as embeddings, which would not be split with the token ids",
    "guidance_scale": "the unguided forward would not see the scans",
    "negative_prompt_ids": "the unguided forward would not see the scans",
    **dict.fromkeys(
        ("past_key_values", "cache"), "the scans are encoded with the whole conversation; leave the cache to generate"
    ),
    "inputs_embeds": "give input_ids, modality_ids and pixel_values",
}


def check_generation(
    input_ids: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any], *, default_config: Any = None
) -> None:
    """Refuses padding on the right, padding that no mask tells, and options that do not work with scans.

    Args:
        input_ids: Shape (B, L).
        attention_mask: Shape (B, L), or None.
        options: For Hugging Face's `generate`, whose `generation_config` may hold options too.
        default_config: The model's own `generation_config`, which holds for what the options leave open.

    Raises:
        ValueError: With what is wrong, and what would be right.
    """
    config = options.get("generation_config")
    for name, reason in _BLIND_OPTIONS.items():
        for value, place in (
            (options.get(name), ""),
            (getattr(config, name, None), ""),
            (getattr(default_config, name, None), " (set it to None in model.generation_config)"),
        ):
            if value is not None:
                raise ValueError(f"generate does not take {name}: {reason}{place}")
    # Not the model's own config: it may come from a training that needed no cache, and nobody asks for that here.
    if options.get("use_cache") is False or getattr(config, "use_cache", None) is False:
        raise ValueError("generate does not take use_cache=False: the scans are encoded once, and then in the cache")
    if attention_mask is None:
        if len(input_ids) > 1:
            raise ValueError("a batch of several prompts needs its attention_mask: padding cannot be told without it")
        return
    if not bool(attention_mask[:, -1].all()):
        raise ValueError('prompts must be padded on the left: padding_side="left"')


def check_keeps_cache(language_model: nn.Module) -> None:
    """Refuses a language model that recomputes its activations: its layers drop the cache while training.

    Raises:
        ValueError: A layer is in train mode with activation checkpointing.
    """
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in language_model.modules()):
        raise ValueError(
            "generate in train mode with activation checkpointing would forget the scans: call model.eval() first"
        )
