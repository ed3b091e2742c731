"""Argument checks of `generate`: options that would ignore the scans or decode wrong tokens are rejected."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

logger = logging.getLogger(__name__)

# Options of Hugging Face's `generate` that run a model on token ids without the scans, and why they are rejected.
_UNSUPPORTED_OPTIONS: Mapping[str, str] = {
    "assistant_model": "the assistant would not see the scans",
    "assistant_early_exit": "assisted decoding is not supported with scans",
    "prompt_lookup_num_tokens": "assisted decoding is not supported with scans",
    "prefill_chunk_size": "the scans are passed as embeddings, which are not split with the token ids",
    "guidance_scale": "the unguided forward would not see the scans",
    "negative_prompt_ids": "the unguided forward would not see the scans",
    **dict.fromkeys(
        ("past_key_values", "cache"), "the scans are encoded with the whole conversation; generate creates the cache"
    ),
    "inputs_embeds": "pass input_ids, modality_ids and pixel_values",
}


def usable_generation_config(config: GenerationConfig) -> GenerationConfig:
    """The generation config of a language model, or its token ids alone if a model could not be saved or used with it.

    Published ones have, for example, a temperature without sampling, which transformers loads but does not save.
    """
    problems = [f"{name}: {why}" for name, why in _UNSUPPORTED_OPTIONS.items() if getattr(config, name, None)]
    try:
        config.validate(strict=True)
    except ValueError as error:
        problems.append(" ".join(str(error).split()))
    if not problems:
        return config
    logger.warning("the language model's generation_config is reduced to its token ids (%s)", "; ".join(problems))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in names})


def check_generation(
    input_ids: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any], *, default_config: Any = None
) -> None:
    """Rejects right padding, several prompts without a mask, and options that do not work with scans.

    Args:
        input_ids: Shape (B, L).
        attention_mask: Shape (B, L), or None.
        options: Keyword arguments for Hugging Face's `generate`, including an optional `generation_config`.
        default_config: The model's own `generation_config`, which provides the defaults.

    Raises:
        ValueError: With the name of the argument and the reason.
    """
    config = options.get("generation_config")
    for name, reason in _UNSUPPORTED_OPTIONS.items():
        for value, place in (
            (options.get(name), ""),
            (getattr(config, name, None), ""),
            (getattr(default_config, name, None), " (set it to None in model.generation_config)"),
        ):
            if value is not None:
                raise ValueError(f"generate does not support {name}: {reason}{place}")
    # The model's own config is not checked: training may have set use_cache to False.
    if options.get("use_cache") is False or getattr(config, "use_cache", None) is False:
        raise ValueError("generate does not support use_cache=False: the scans are encoded once and kept in the cache")
    if attention_mask is None:
        if len(input_ids) > 1:
            raise ValueError("attention_mask is missing: a batch of several prompts needs it to identify padding")
        return
    if not bool(attention_mask[:, -1].all()):
        raise ValueError('attention_mask: prompts must be padded on the left; use padding_side="left"')


def check_keeps_cache(language_model: nn.Module) -> None:
    """Rejects activation checkpointing in train mode, where the language model's layers do not keep a cache.

    Raises:
        ValueError: A layer is in train mode with activation checkpointing.
    """
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in language_model.modules()):
        raise ValueError(
            "generate in train mode with activation checkpointing would lose the scans; call model.eval() first"
        )
