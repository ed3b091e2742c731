"""Hugging Face vision encoders that take the tokens of our patch embeds: one row per family."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
)
from transformers import initialization as init

from umbrella_model.inflate import PatchWeights


class SpecialTokens(nn.Module):
    """Replaces the 2-D embeddings of an encoder: adds its class and register tokens in front of the patch tokens.

    Args:
        tokens: Shape (S, D), positions included; S is 0 for encoders without such tokens.
    """

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.count = len(tokens)
        # An empty parameter would be one more tensor without a gradient.
        self.special_tokens = nn.Parameter(tokens.detach().clone()) if self.count else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens of shape (N, L, D) to (N, S + L, D)."""
        if self.special_tokens is None:
            return tokens
        return torch.cat((self.special_tokens.to(tokens.dtype).expand(len(tokens), -1, -1), tokens), dim=1)


class TokenEncoder:
    """Mixin of Hugging Face vision models whose `embeddings` were replaced by `SpecialTokens`."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        """Features of patch tokens; both have shape (N, L, D)."""
        family = FAMILIES[self.config.model_type]
        hidden = self.embeddings(tokens)
        if family.pre_norm is not None:
            hidden = getattr(self, family.pre_norm)(hidden)
        for layer in encoder_layers(self):
            hidden = layer(hidden, None)  # the second argument is a mask
        features: Tensor = getattr(self, family.norm)(hidden)
        return features[:, self.embeddings.count :]

    def _init_weights(self: Any, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]  # that of the Hugging Face model
        if isinstance(module, SpecialTokens) and module.special_tokens is not None:
            init.normal_(module.special_tokens, std=0.02)


class SiglipTokenEncoder(TokenEncoder, SiglipVisionModel):
    """SigLIP on patch tokens."""


class Siglip2TokenEncoder(TokenEncoder, Siglip2VisionModel):
    """SigLIP 2 (NaFlex) on patch tokens."""


class CLIPTokenEncoder(TokenEncoder, CLIPVisionModel):
    """CLIP on patch tokens."""


class Dinov2TokenEncoder(TokenEncoder, Dinov2Model):
    """DINOv2 on patch tokens."""


class Dinov2WithRegistersTokenEncoder(TokenEncoder, Dinov2WithRegistersModel):
    """DINOv2 with registers on patch tokens."""


class ViTTokenEncoder(TokenEncoder, ViTModel):
    """ViT on patch tokens."""


class ViTMAETokenEncoder(TokenEncoder, ViTMAEModel):
    """The encoder of a masked autoencoder on patch tokens; none are masked."""


@dataclass(frozen=True)
class EncoderFamily:
    """Where a Hugging Face vision encoder has its parts.

    Attributes:
        model_type: That of the vision encoder's config.
        source: Hugging Face's class.
        encoder: The same class on patch tokens.
        patch: The patch filter in `embeddings`, a Conv2d or, over flattened patches of (row, column, colour), a Linear.
        positions: The position table in `embeddings`; rows before those of the patches belong to a class token.
        special: The special tokens in `embeddings`, in the order of the sequence.
        norm: The norm after the last layer.
        norm_in_output: Whether `last_hidden_state` is after that norm.
        pre_norm: The norm before the first layer.
        container: Model type of a checkpoint with more towers, whose `vision_config` describes this encoder.
    """

    model_type: str
    source: type[PreTrainedModel]
    encoder: type[PreTrainedModel]
    patch: str
    positions: str
    special: tuple[str, ...]
    norm: str
    norm_in_output: bool = True
    pre_norm: str | None = None
    container: str | None = None

    def embedding_keys(self, *, patches: bool) -> tuple[str, ...]:
        """Keys in the Hugging Face model of what becomes special tokens and, with `patches`, patch embeds."""
        keys = (*self.special, self.positions) if self.special else ()
        if patches:
            keys = (*keys, f"{self.patch}.weight", f"{self.patch}.bias", self.positions)
        return tuple(f"embeddings.{key}" for key in dict.fromkeys(keys))


_SIGLIP: dict[str, Any] = {
    "patch": "patch_embedding",
    "positions": "position_embedding.weight",
    "special": (),
    "norm": "post_layernorm",
}
_VIT: dict[str, Any] = {
    "patch": "patch_embeddings.projection",
    "positions": "position_embeddings",
    "special": ("cls_token",),
    "norm": "layernorm",
}
_ROWS = (
    EncoderFamily("siglip_vision_model", SiglipVisionModel, SiglipTokenEncoder, **_SIGLIP, container="siglip"),
    EncoderFamily("siglip2_vision_model", Siglip2VisionModel, Siglip2TokenEncoder, **_SIGLIP, container="siglip2"),
    EncoderFamily(
        "clip_vision_model",
        CLIPVisionModel,
        CLIPTokenEncoder,
        **(_SIGLIP | {"special": ("class_embedding",)}),
        norm_in_output=False,
        pre_norm="pre_layrnorm",
        container="clip",
    ),
    EncoderFamily("dinov2", Dinov2Model, Dinov2TokenEncoder, **_VIT),
    EncoderFamily(
        "dinov2_with_registers",
        Dinov2WithRegistersModel,
        Dinov2WithRegistersTokenEncoder,
        **(_VIT | {"special": ("cls_token", "register_tokens")}),
    ),
    EncoderFamily("vit", ViTModel, ViTTokenEncoder, **_VIT),
    EncoderFamily("vit_mae", ViTMAEModel, ViTMAETokenEncoder, **_VIT),
)
FAMILIES: dict[str, EncoderFamily] = {row.model_type: row for row in _ROWS}
"""The supported families, by the `model_type` of the vision encoder's config."""
CONTAINERS: dict[str, EncoderFamily] = {row.container: row for row in _ROWS if row.container is not None}


def supported_encoders() -> str:
    """What can be a vision encoder, for messages."""
    return (
        f"{', '.join(FAMILIES)} of Hugging Face (also inside of {', '.join(CONTAINERS)}), monai.networks.nets.ViT, and "
        "modules that map tokens of shape (N, L, D) to (N, L, D)"
    )


def family_of(config: PretrainedConfig, *, name: str | None = None) -> EncoderFamily:
    """The family of a vision encoder's config.

    Args:
        config: The config of the encoder itself, or of a SigLIP or CLIP model that contains it.
        name: How to name the encoder in the message; None for its model type alone.

    Raises:
        ValueError: The encoder is not supported; the message lists those that are.
    """
    family = FAMILIES.get(config.model_type) or CONTAINERS.get(config.model_type)
    if family is None:
        which = f"{config.model_type!r}" if name is None else f"{name!r} ({config.model_type})"
        raise ValueError(f"vision encoder {which} is not supported; use one of {supported_encoders()}")
    return family


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The list of layers, wherever the version of transformers has it."""
    return next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))


def adapt_encoder(model: Any, *, depth: int, final_norm: bool) -> PatchWeights:
    """Makes a Hugging Face vision model take patch tokens, in place.

    Removed are the 2-D embeddings (special tokens are kept), layers from `depth` on, the final norm if it is not
    applied, pooling and heads: their parameters would get no gradient, which DDP does not allow.

    Args:
        model: A model of a class in `FAMILIES`.
        depth: Number of layers to keep.
        final_norm: Whether the features are after the norm that gives Hugging Face's `last_hidden_state`.

    Returns:
        The patch filter and positions that were removed.
    """
    family = family_of(model.config, name=type(model).__name__)
    patches, special = _read_embeddings(model, family)
    model.embeddings = SpecialTokens(special)
    layers = encoder_layers(model)
    del layers[depth:]
    if not (final_norm and family.norm_in_output):
        setattr(model, family.norm, nn.Identity())
    for name in ("head", "pooler"):
        if hasattr(model, name):
            delattr(model, name)
    model.__class__ = family.encoder
    return patches


@torch.no_grad()
def _read_embeddings(model: Any, family: EncoderFamily) -> tuple[PatchWeights, Tensor]:
    """Patch filter and positions, and the special tokens of shape (S, D) with their positions."""
    config, embeddings = model.config, model.embeddings
    filters = attrgetter(family.patch)(embeddings)
    weight = filters.weight
    if weight.dim() == 2:
        rows = config.patch_size
        weight = weight.unflatten(1, (rows, rows, config.num_channels)).movedim(-1, 1)
    table: Tensor = attrgetter(family.positions)(embeddings)
    table = table.reshape(-1, table.shape[-1])
    tokens = [getattr(embeddings, name).reshape(-1, table.shape[1]) for name in family.special]
    # Volume encoders without a class token are ViTs with this entry.
    if not tokens or not getattr(config, "use_class_token", True):
        special, num_special = table[:0], 0
    else:
        special, num_special = torch.cat(tokens), 1
    # Registers have no positions.
    special = torch.cat((special[:num_special] + table[:num_special], special[num_special:]))
    positions = table[num_special:]
    return PatchWeights(weight, filters.bias, positions, _grid(config, len(positions))), special


def _grid(config: Any, num_patches: int) -> tuple[int, ...]:
    """Rows and columns of a position table; image sizes may be a number or one number per axis."""
    size = getattr(config, "image_size", None)  # NaFlex has none
    if isinstance(size, Collection):
        patch = config.patch_size
        patches = patch if isinstance(patch, Collection) else (patch,) * len(size)
        grid = tuple(s // p for s, p in zip(size, patches, strict=True))
        if math.prod(grid) == num_patches:
            return grid
    side = math.isqrt(num_patches)
    if size is None and side**2 != num_patches:
        raise ValueError(
            f"the vision encoder ({config.model_type}) has positions of {num_patches} patches, and its config does not "
            "say of how many rows and columns; use one with a square number"
        )
    return (side, side)
