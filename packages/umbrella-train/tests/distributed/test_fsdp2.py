"""The layers that are sharded and compiled one by one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PretrainedConfig,
    Qwen2Config,
    Siglip2VisionConfig,
    ViTConfig,
)

from umbrella_model import OwnEncoderConfig, PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train.distributed.fsdp2 import transformer_layers

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


class Block(nn.Module):
    """A layer with a list of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])


class Blocks(nn.Module):
    """An own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            for layer in block.layers:
                tokens = tokens + layer(tokens)
        return tokens


def build(
    vision: PretrainedConfig, text: PretrainedConfig, *, encoder: nn.Module | None = None
) -> UmbrellaForConditionalGeneration:
    return UmbrellaForConditionalGeneration(
        UmbrellaConfig(
            modalities={"T1": PatchEmbedConfig((4, 4, 4), (4, 4, 4))},
            vision_config=vision,
            text_config=text,
            image_token_index=19,
        ),
        vision_encoder=encoder,
    )


@pytest.mark.parametrize(
    ("config", "encoder"),
    [
        (CLIPVisionConfig(**SIZES, image_size=16, patch_size=4), None),
        (Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4), None),
        (Dinov2Config(**SIZES, image_size=16, patch_size=4), None),
        (ViTConfig(**SIZES, image_size=16, patch_size=4), None),
        (OwnEncoderConfig(hidden_size=16), Blocks()),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_layers_of_every_encoder_are_found(config: PretrainedConfig, encoder: nn.Module | None) -> None:
    text = Qwen2Config(**SIZES | {"num_hidden_layers": 2}, num_key_value_heads=1, vocab_size=20, intermediate_size=16)
    model = build(config, text, encoder=encoder)
    layers = list(transformer_layers(model))
    assert len(layers) == 3 + 2
    assert layers[3:] == list(model.model.language_model.layers)
    assert all(layer in list(model.model.vision_tower.encoder.modules()) for layer in layers[:3])


@pytest.mark.parametrize(
    ("kind", "options", "path"),
    [
        ("gpt2", {}, "h"),
        ("gptj", {"rotary_dim": 4}, "h"),
        ("gpt_bigcode", {}, "h"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "h"),
        ("falcon", {}, "h"),
        ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2}, "blocks"),
        ("opt", {"ffn_dim": 16, "word_embed_proj_dim": 16}, "decoder.layers"),
        ("gpt_neox", {}, "layers"),
    ],
)
def test_layers_of_every_language_model_are_found(kind: str, options: dict[str, Any], path: str) -> None:
    sizes = {**SIZES, "num_hidden_layers": 2, "vocab_size": 20, "pad_token_id": 0, "intermediate_size": 16}
    model = build(CLIPVisionConfig(**SIZES, image_size=16, patch_size=4), AutoConfig.for_model(kind, **sizes | options))
    layers = list(transformer_layers(model))
    assert len(layers) == 3 + 2
    assert layers[3:] == list(model.model.language_model.get_submodule(path))
