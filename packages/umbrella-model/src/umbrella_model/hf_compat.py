"""Private names of transformers and torch that this package uses, and differences between versions of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaModel

# Transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.
CACHE: Literal["cache", "past_key_values"] = (
    "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"
)

PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "torch:_assert_async": (),
    "transformers:PreTrainedConfig._attn_implementation": (),
    "transformers:PreTrainedModel._init_weights": ("module",),
    "transformers:PreTrainedModel._no_split_modules": (),
}
"""`module:name` or `module:Class.name` of each, with the parameters that are relied on.

Overridden ones are used where they are overridden, the others here only.
"""


def attention_of(config: Any) -> str:
    """The attention that a model with this config computes, for example `sdpa`."""
    return str(config._attn_implementation)


def require(condition: Tensor, message: str) -> None:
    """Raises a ValueError if a 0-dim tensor is false; on a GPU, an asynchronous assertion does not wait for it."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
