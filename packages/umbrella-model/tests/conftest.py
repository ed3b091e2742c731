"""Shared fixtures: small models, and batches of conversations with scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig

from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration

# On models of this size threads cost more than they save, especially with several test workers.
torch.set_num_threads(1)

IMAGE_TOKEN = 60
VOCABULARY = 64

# Not in alphabetical order, and with different numbers of tokens: 8, 4 and 2.
MODALITIES = {
    "rsfMRI": PatchEmbedConfig(image_size=(8, 8, 8, 4), patch_size=(4, 4, 8, 2)),
    "T1": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8)),
    "dMRI": PatchEmbedConfig(image_size=(8, 8, 4), patch_size=(4, 8, 4), in_channels=2),
}


def vision_config(kind: str = "siglip", **options: Any) -> PretrainedConfig:
    """A vision encoder of three layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[kind]
    return config(**(sizes | {"image_size": 16, "patch_size": 4} | options))


def text_config(kind: str = "qwen2", **options: Any) -> PretrainedConfig:
    """A language model of two layers, with weights large enough for different inputs to give different outputs."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "initializer_range": 0.2, "eos_token_id": None}
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind]
    return config(**(sizes | more | {"pad_token_id": 0, "bos_token_id": None} | options))


@pytest.fixture
def make_config() -> Callable[..., UmbrellaConfig]:
    """A configuration with small sizes; keyword arguments replace its entries."""

    def make(**options: Any) -> UmbrellaConfig:
        entries = {"vision_config": vision_config(), "text_config": text_config(), "image_token_index": IMAGE_TOKEN}
        return UmbrellaConfig(**(entries | {"modalities": MODALITIES} | options))

    return make


@pytest.fixture
def make_model(make_config: Callable[..., UmbrellaConfig]) -> Callable[..., UmbrellaForConditionalGeneration]:
    """A small model with the same weights at every call."""

    def make(**options: Any) -> UmbrellaForConditionalGeneration:
        torch.manual_seed(0)
        return UmbrellaForConditionalGeneration(make_config(**options)).train()

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Any]]:
    """A batch of rows such as `(3, "T1", 2)`: three words, a scan, two words. The last two words are supervised."""
    return build_batch


def build_batch(
    *rows: Sequence[int | str],
    modalities: Mapping[str, PatchEmbedConfig] = MODALITIES,
    padding_side: str = "right",
    seed: int = 0,
) -> dict[str, Any]:
    """See `make_batch`; the words and volumes of a row depend only on the row and the seed."""
    order = list(modalities)
    encoded, volumes = [], {name: [] for name in order}
    for row in rows:
        generator = torch.Generator().manual_seed(
            seed + sum(ord(letter) * place for place, letter in enumerate(str(row)))
        )
        ids: list[int] = []
        tags: list[int] = []
        for item in row:
            if isinstance(item, int):
                ids += torch.randint(1, IMAGE_TOKEN, (item,), generator=generator).tolist()
                tags += [0] * item
                continue
            config = modalities[item]
            ids += [IMAGE_TOKEN] * config.num_tokens
            tags += [order.index(item) + 1] * config.num_tokens
            volumes[item].append(torch.randn(config.in_channels, *config.image_size, generator=generator))
        encoded.append((ids, tags))
    length = max(len(ids) for ids, _ in encoded)
    batch: dict[str, Any] = {
        "input_ids": _pad([ids for ids, _ in encoded], length, padding_side, 0),
        "attention_mask": _pad([[1] * len(ids) for ids, _ in encoded], length, padding_side, 0),
        "modality_ids": _pad([tags for _, tags in encoded], length, padding_side, 0),
        "labels": _pad([[-100] * (len(ids) - 2) + ids[-2:] for ids, _ in encoded], length, padding_side, -100),
    }
    batch["pixel_values"] = {name: torch.stack(scans) for name, scans in volumes.items() if scans}
    return batch


def _pad(rows: list[list[int]], length: int, side: str, value: int) -> Tensor:
    fill = [[value] * (length - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([row + more if side == "right" else more + row for row, more in pairs])
