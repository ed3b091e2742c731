"""Private names of transformers and torch that this package uses, and differences between versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaModel

# Transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.
CACHE: Literal["cache", "past_key_values"] = (
    "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"
)


def attention_of(config: Any) -> str:
    """The attention that a model with this config computes, for example `sdpa`."""
    return str(config._attn_implementation)


def mark_initialized(module: nn.Module) -> None:
    """Keeps Hugging Face's initialisation of a model from changing the weights of this part of it."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def require(condition: Tensor, message: str) -> None:
    """Raises a ValueError if a 0-dim tensor is false; on a GPU, an asynchronous assertion does not wait for it."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def tie_head(model: Any, embedding: str) -> None:
    """Names the parameter that the weight of `lm_head` is tied to, if the config ties them."""
    model._tied_weights_keys = {"lm_head.weight": embedding}
