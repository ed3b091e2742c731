"""Differences between the supported versions of transformers."""

from __future__ import annotations

import inspect
from typing import Literal

from transformers.models.llava.modeling_llava import LlavaModel

# Transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.
CACHE: Literal["cache", "past_key_values"] = (
    "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"
)
