"""The variants of `bench_step.py`, with equal weights: our model, Hugging Face's LLaVA with `Conv3d`, a merge loop."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_model.parts import named_part_parameters
from umbrella_model.patch_embed import PatchEmbed

VOCABULARY, FILL = 151_936, 0
# Widths of the vision encoder and of the language model, and the voxels along X, Y and Z.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vision": (32, 64, 2, 2), "text": (32, 64, 2, 2, 1), "vocabulary": 512, "image": 16, "patch": 8},
    # Tower, language model and head about in proportion to llava-interleave-qwen-7b (weights 1 : 18 : 5).
    "text": {"vision": (96, 384, 1, 2), "text": (256, 1024, 2, 4, 2), "vocabulary": 2048, "image": 48, "patch": 8},
    "toy": {"vision": (192, 768, 4, 4), "text": (256, 1024, 4, 4, 2), "vocabulary": 8192, "image": 96, "patch": 16},
    "0.5b": {
        "vision": (1152, 4304, 27, 16), "text": (896, 4864, 24, 14, 2), "vocabulary": VOCABULARY, "image": 96,
        "patch": 16,
    },
}  # fmt: skip
Batch = dict[str, Any]


def build_model(options: argparse.Namespace) -> UmbrellaForConditionalGeneration:
    """UMBRELLA's model with random weights."""
    torch.manual_seed(0)
    size = SIZES[options.size]
    image, patch = (size["image"],) * 3, (size["patch"],) * 3
    config = UmbrellaConfig(
        modalities={"T1": PatchEmbedConfig(image, patch), "rsfMRI": PatchEmbedConfig((*image, 24), (*patch, 3))},
        vision_config=_vision_config(size),
        text_config=_text_config(size),
        image_token_index=size["vocabulary"] - 1,
    )
    with torch.device(options.device):  # a GPU draws random weights in much less time than a CPU
        model = UmbrellaForConditionalGeneration(config).to(getattr(torch, options.dtype)).train()
    # The kernel for packed rows needs a GPU; on a CPU sdpa is as fast.
    model.set_attn_implementation("varlen" if options.device == "cuda" else "sdpa")
    return model


def _vision_config(size: dict[str, Any]) -> PretrainedConfig:
    width, inner, layers, heads = size["vision"]
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vision_use_head=False,
    )


def _text_config(size: dict[str, Any]) -> PretrainedConfig:
    width, inner, layers, heads, key_heads = size["text"]
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=size["vocabulary"],
        tie_word_embeddings=True,
        pad_token_id=FILL,
    )


def as_conv3d(patch_embed: PatchEmbed) -> nn.Conv3d:
    """`Conv3d` with the weights of a patch embed; for a series, the frames of a patch are channels."""
    patch = patch_embed.config.patch_size
    weight = patch_embed.proj.weight.detach().reshape(-1, 1, *patch)
    if len(patch) > 3:
        weight = weight.permute(0, 1, 5, 2, 3, 4).flatten(1, 2)
    kernel = (patch[0], patch[1], patch[2])
    conv = nn.Conv3d(weight.shape[1], len(weight), kernel_size=kernel, stride=kernel)
    conv.to(weight.device, weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(patch_embed.proj.bias)
    return conv


def frames_as_channels(series: Tensor, frames: int) -> Tensor:
    """Series (N, 1, X, Y, Z, T) to windows as input of `Conv3d`, shape (N * windows, frames, X, Y, Z)."""
    windows = series.unflatten(-1, (-1, frames)).permute(0, 5, 1, 6, 2, 3, 4)
    return windows.flatten(2, 3).flatten(0, 1)


def tokens_of(maps: Tensor, *, num_scans: int) -> Tensor:
    """Feature maps (N, H, x, y, z) to tokens in the order of the patch embed, with time fastest."""
    tokens = maps.flatten(2).transpose(1, 2).unflatten(0, (num_scans, -1))
    return tokens.transpose(1, 2).flatten(1, 2)


class ConvEmbeddings(nn.Module):
    """Embeddings of a simple port of LLaVA to volumes: `Conv3d` for `Conv2d`, with frames of a patch as channels."""

    def __init__(self, patch_embed: Any) -> None:
        super().__init__()
        patch = patch_embed.config.patch_size
        self.frames = patch[3] if len(patch) > 3 else 0
        self.conv = as_conv3d(patch_embed)
        self.position_embedding = nn.Parameter(patch_embed.position_embedding.detach().clone())

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:  # noqa: ARG002
        """Tokens (N, P, H) of volumes (N, 1, X, Y, Z[, T]); the encoder requires this signature."""
        num_scans = len(pixel_values)
        if self.frames:
            pixel_values = frames_as_channels(pixel_values, self.frames)
        return tokens_of(self.conv(pixel_values), num_scans=num_scans) + self.position_embedding


class ConvEmbeddingsByAxes(nn.Module):
    """Infers the modality from the number of axes; for the merge loop, which encodes scans one by one."""

    def __init__(self, model: UmbrellaForConditionalGeneration) -> None:
        super().__init__()
        tower = model.model.vision_tower
        self.volume = ConvEmbeddings(tower.patch_embed("T1"))
        self.series = ConvEmbeddings(tower.patch_embed("rsfMRI"))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:  # noqa: ARG002
        """Tokens (N, P, H) of volumes (N, 1, X, Y, Z) or series (N, 1, X, Y, Z, T)."""
        tokens: Tensor = (self.volume if pixel_values.ndim == 5 else self.series)(pixel_values)
        return tokens


def build_llava(model: UmbrellaForConditionalGeneration, modality: str | None) -> LlavaForConditionalGeneration:
    """Hugging Face's LLaVA with our weights, `Conv3d` patches and its own attention; None supports both modalities."""
    config = LlavaConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=model.config.text_config.to_dict(),
        image_token_index=model.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    parameter = next(model.parameters())
    with parameter.device:
        llava = LlavaForConditionalGeneration(config).train()
    llava.to(dtype=parameter.dtype)
    ours = model.model
    llava.model.vision_tower.encoder.load_state_dict(ours.vision_tower.encoder.encoder.state_dict())
    llava.model.multi_modal_projector.load_state_dict(ours.multi_modal_projector.state_dict())
    llava.model.language_model.load_state_dict(ours.language_model.state_dict())
    llava.model.vision_tower.embeddings = (
        ConvEmbeddingsByAxes(model) if modality is None else ConvEmbeddings(ours.vision_tower.patch_embed(modality))
    )
    is_trainable = {part: parameter.requires_grad for part, _, parameter in named_part_parameters(model)}
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_(is_trainable[_part_in_llava(name)] and "post_layernorm" not in name)
    return llava


def _part_in_llava(name: str) -> Any:
    if "vision_tower.embeddings" in name:
        return "patch_embed"
    if "vision_tower" in name:
        return "vision_tower"
    if "projector" in name:
        return "projector"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "language_model"


def merge_loop_loss(llava: LlavaForConditionalGeneration, batch: Batch, volumes: Iterable[Tensor]) -> Tensor:
    """Loss of a merge loop: one tower call per sample, concatenated embeddings, padded rows, and logits everywhere.

    Args:
        llava: From `build_llava`.
        batch: A padded batch with one scan per sample.
        volumes: Each sample's scan, shape (1, X, Y, Z[, T]).
    """
    rows, labels = [], []
    image_id = llava.config.image_token_id
    for all_ids, mask, all_labels, volume in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], volumes, strict=True
    ):
        ids, row_labels = all_ids[mask.bool()], all_labels[mask.bool()]
        hidden = llava.model.vision_tower(volume[None], output_hidden_states=True).hidden_states[-1]
        features = llava.model.multi_modal_projector(hidden)[0]
        start = int((ids == image_id).nonzero()[0])
        before, after = ids[:start], ids[start + len(features) :]
        embed = llava.get_input_embeddings()
        rows.append(torch.cat([embed(before), features.to(embed.weight.dtype), embed(after)]))
        labels.append(row_labels)
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    logits = llava(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
