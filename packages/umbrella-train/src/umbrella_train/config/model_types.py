"""Hugging Face config classes by model type, with those of `umbrella_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

import umbrella_model  # noqa: F401  (registers its model types)

CONFIG_CLASSES: Mapping[str, Any] = CONFIG_MAPPING
"""The classes of transformers, and `umbrella_vision_encoder` for own vision encoders."""
