"""What the installed transformers calls the cache of earlier positions."""

from __future__ import annotations

import inspect
from typing import Literal

from transformers.models.llava.modeling_llava import LlavaModel

# Arguments and outputs were renamed together, in transformers 5.24; of either name the other is warned of or unknown.
CACHE: Literal["cache", "past_key_values"] = (
    "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"
)
