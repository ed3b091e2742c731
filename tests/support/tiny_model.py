"""The `model` section of runs that train in seconds on a CPU: three modalities, one layer each, dropout."""

from __future__ import annotations

from typing import Any

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL: dict[str, Any] = {
    "vision_config": {"model_type": "siglip_vision_model", **_SIZES, "vision_use_head": False},
    "text_config": {
        "model_type": "qwen2",
        **_SIZES,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
        "max_position_embeddings": 512,
    },
    "vision_feature_layer": -1,
    "modalities": {
        "rsfMRI": {"image_size": [8, 8, 8, 8], "patch_size": [8, 8, 4, 4]},
        "T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]},
        "dMRI": {"image_size": [8, 8, 8], "patch_size": [8, 8, 2]},
    },
}
