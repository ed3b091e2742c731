"""A tiny three-modality model and examples of any mixture, for tests that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, Qwen2Config, SiglipVisionConfig

from umbrella_data import Example, ExampleScan, PaddingCollator
from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train.batches.collators import SupervisedCollator

VOCABULARY = 64
IMAGE_TOKEN, PADDING = 63, 0
# Not alphabetical, so that a sorted table is noticed.
ORDER = ("rsfMRI", "T1", "dMRI")
PATCH_EMBEDS = {
    "T1": PatchEmbedConfig((8, 8, 8), (4, 4, 4)),
    "rsfMRI": PatchEmbedConfig((8, 8, 4, 4), (4, 4, 4, 2)),
    "dMRI": PatchEmbedConfig((8, 8, 8), (4, 4, 8), in_channels=2),
}

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_WORDS = {**_SIZES, "initializer_range": 0.1, "max_position_embeddings": 64}
_VISION = {**_SIZES, "image_size": 16, "patch_size": 4}
# Language model, vision encoder and projector of `build_composed`; language models without dropout.
COMPOSED: dict[str, tuple[tuple[str, dict[str, Any]], str, Literal["mlp", "linear"]]] = {
    # Tied, layers of Conv1D called h, absolute positions; a class token, and norms at both ends.
    "gpt2": (("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}), "clip_vision_model", "mlp"),
    # Tied, scaled logits and embeddings.
    "granite": (
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True}),
        "vit",
        "linear",
    ),
    # A head with a bias.
    "phi": (("phi", {}), "dinov2", "mlp"),
    # Another attention in each second layer; limited logits.
    "gemma2": (
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
        "siglip2_vision_model",
        "linear",
    ),
    # Layers two modules deep, tied; positions that count over the row.
    "opt": (("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}), "dinov2_with_registers", "mlp"),
    # A recurrent state.
    "falcon_h1": (
        ("falcon_h1", {"num_key_value_heads": 1, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
        "vit_mae",
        "linear",
    ),
}

# Gemma 2 has eager attention, which is rejected for packed batches.
UNPACKED = ("gemma2", "opt", "falcon_h1")


def build_composed(name: str, *, seed: int = 0) -> UmbrellaForConditionalGeneration:
    """A model composed by `from_parts` from random parts, with the vocabulary and modalities of `build_model`."""
    torch.manual_seed(seed)
    (kind, options), vision, projector = COMPOSED[name]
    # The image token is the row that `from_parts` adds.
    tokens = {"vocab_size": IMAGE_TOKEN, "pad_token_id": PADDING, "bos_token_id": None, "eos_token_id": None}
    model = UmbrellaForConditionalGeneration.from_parts(
        language_model=AutoConfig.for_model(kind, **_WORDS | tokens | options),
        vision_encoder=AutoConfig.for_model(vision, **_VISION),
        modalities={name: PATCH_EMBEDS[name] for name in ORDER},
        projector=projector,
    )
    return model.train()


def build_model(
    *, seed: int = 0, order: Sequence[str] = ORDER, tie: bool = False, width: int = 32
) -> UmbrellaForConditionalGeneration:
    """Random weights from a seed, no dropout."""
    torch.manual_seed(seed)
    return UmbrellaForConditionalGeneration(
        UmbrellaConfig(
            modalities={name: PATCH_EMBEDS[name] for name in order},
            vision_config=SiglipVisionConfig(
                hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2
            ),
            text_config=Qwen2Config(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=VOCABULARY,
                tie_word_embeddings=tie,
            ),
            image_token_id=IMAGE_TOKEN,
            tie_word_embeddings=tie,
        )
    )


def build_collator(order: Sequence[str] = ORDER, *, padding_side: str = "right") -> PaddingCollator:
    """The collator of a run for the model; with right padding it adds the supervised positions."""
    kind = SupervisedCollator if padding_side == "right" else PaddingCollator
    return kind(pad_token_id=PADDING, modality_order=list(order), padding_side=padding_side)


def build_example(modalities: Sequence[str], *, index: int, num_supervised: int | None = None) -> Example:
    """One conversation with these scans, random by its index; lengths and supervised tokens vary."""
    generator = torch.Generator().manual_seed(1000 + index)

    def words(count: int) -> torch.Tensor:
        return torch.randint(1, IMAGE_TOKEN, (count,), generator=generator)

    supervised = 2 + index % 4 if num_supervised is None else num_supervised
    pieces, scans, position = [words(3)], [], 3
    for name in modalities:
        config = PATCH_EMBEDS[name]
        volume = torch.randn(config.in_channels, *config.image_size, generator=generator)
        scans.append(ExampleScan(name, volume, start=position, num_tokens=config.num_patches))
        pieces += [torch.full((config.num_patches,), IMAGE_TOKEN), words(1)]
        position += config.num_patches + 1
    answer = words(supervised)
    input_ids = torch.cat([*pieces, answer])
    labels = torch.full_like(input_ids, -100)
    labels[-supervised:] = answer
    return Example(input_ids=input_ids, labels=labels, scans=tuple(scans), index=index)


class ToyDataset(Dataset[Example]):
    """Examples with given scans, as a data set of virtual indices.

    Args:
        kinds: The modalities of each sample.
    """

    is_epoch_constant = True

    def __init__(self, kinds: Sequence[Sequence[str]]) -> None:
        self.kinds = [tuple(kind) for kind in kinds]

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Example:
        return build_example(self.kinds[index % len(self)], index=index)

    def modalities(self, index: int) -> tuple[str, ...]:
        """As in `ConversationDataset`."""
        return self.kinds[index % len(self)]

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """As in `ConversationDataset`."""
        return frozenset(frozenset(kind) for kind in self.kinds)
