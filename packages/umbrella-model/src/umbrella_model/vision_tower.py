"""The vision tower: a patch embed a modality in front of one Hugging Face vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from umbrella_model.config import UmbrellaConfig
from umbrella_model.patch_embed import PatchEmbed, build_patch_embed
from umbrella_model.pooling import pool_tokens
from umbrella_model.sharding_state import is_sharded, is_sharded_by_zero


@dataclass
class VisionTowerOutput:
    """What the tower makes of a batch.

    Attributes:
        features: For each modality present, shape (N_m, num_tokens, hidden_size), pooled.
        dummy_terms: For each absent, trainable modality while training, a 0-dim float32 tensor. Under DeepSpeed ZeRO-3
            there is an exact zero for each present one as well.
        idle: Encoder outputs of zero tokens, shape (1, 1, hidden_size) each. They carry no information; the model
            joins them to the graph with weight zero so that the encoder and the projector take part in every step.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    dummy_terms: dict[str, Tensor] = field(default_factory=dict)
    idle: list[Tensor] = field(default_factory=list)


class ReadyTokens(nn.Module):
    """Stands where a Hugging Face encoder has its 2-D embeddings: the tokens come ready from the patch embeds."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False) -> Tensor:  # noqa: ARG002
        """Returns the tokens as they are; the signature is the encoder's."""
        return pixel_values


def reduce_encoder(encoder: Any, *, depth: int) -> nn.Module:
    """Leaves of a Hugging Face vision encoder what a forward can reach; changes it in place.

    The 2-D embeddings, the layers behind `vision_feature_layer`, the final norm (LLaVA's features come before it) and
    the pooling head are left out: a trainable parameter that gets no gradient stops DDP.

    Args:
        encoder: A SigLIP or CLIP vision model.
        depth: How many layers to keep.

    Raises:
        ValueError: The encoder is not built as SigLIP's and CLIP's are.
    """
    missing = [name for name in ("embeddings", "encoder", "post_layernorm") if not hasattr(encoder, name)]
    if missing:
        raise ValueError(
            f"vision encoder {type(encoder).__name__!r} has no {', '.join(missing)}; "
            "use siglip_vision_model or clip_vision_model"
        )
    encoder.embeddings = ReadyTokens()
    encoder.encoder.layers = encoder.encoder.layers[:depth]
    encoder.post_layernorm = nn.Identity()
    if hasattr(encoder, "head"):
        del encoder.head
    encoder.use_head = False
    assert isinstance(encoder, nn.Module)
    return encoder


class UmbrellaVisionTower(nn.Module):
    """`{modality}_patch_embed` modules in front of one encoder, called in an order that never depends on the batch."""

    def __init__(self, config: UmbrellaConfig) -> None:
        super().__init__()
        config.settle_modalities()
        if not config.patch_embeds:
            raise ValueError(
                "a model needs at least one modality: UmbrellaConfig(modalities={'T1': PatchEmbedConfig(...)})"
            )
        self.modality_order = tuple(config.patch_embeds)
        self.hidden_size: int = config.vision_config.hidden_size
        for name, patch_embed in config.patch_embeds.items():
            self.add_module(f"{name}_patch_embed", build_patch_embed(patch_embed, hidden_size=self.hidden_size))
        self.encoder = reduce_encoder(AutoModel.from_config(config.vision_config), depth=config.vision_depth)

    def patch_embed(self, modality: str) -> PatchEmbed:
        """The patch embed of a modality.

        Raises:
            KeyError: The model has no such modality; the message lists those it has.
        """
        if modality not in self.modality_order:
            raise KeyError(
                f"modality {modality!r} is unknown to this model, which has {', '.join(self.modality_order)}"
            )
        module = getattr(self, f"{modality}_patch_embed")
        assert isinstance(module, PatchEmbed)
        return module

    def forward(self, pixel_values: Mapping[str, Tensor] | None, *, keep_in_graph: bool = False) -> VisionTowerOutput:
        """Encodes the scans of a batch.

        Every patch embed is called in `modality_order`, with volumes or with none. A sharded engine pairs its
        collectives by call order, so under one the encoder too is called once for every modality.

        Args:
            pixel_values: For each modality present, shape (N_m, C, *image_size).
            keep_in_graph: Whether what follows the encoder is trainable, so that a batch without scans still has to
                run the encoder on one zero token.

        Returns:
            Features, dummy terms and idle outputs.

        Raises:
            KeyError: `pixel_values` has a modality that the model has not.
        """
        pixel_values = pixel_values or {}
        for name in pixel_values:
            self.patch_embed(name)
        learns = self.training and torch.is_grad_enabled()
        sharded, under_zero = is_sharded(self), is_sharded_by_zero(self)
        output = VisionTowerOutput()
        tokens: dict[str, Tensor | None] = {}
        for name in self.modality_order:
            tokens[name] = None
            if name in pixel_values:
                tokens[name] = self.patch_embed(name)(pixel_values[name])
                if learns and under_zero and self._is_trainable(name):
                    # ZeRO-3 counts the tensors that a module returns, and wants as many of them on every rank.
                    output.dummy_terms[name] = torch.zeros((), device=pixel_values[name].device, requires_grad=True)
            elif learns or sharded:
                term = self.patch_embed(name)(None)
                if learns and term is not None:
                    output.dummy_terms[name] = term
        for name, modality_tokens in tokens.items():
            if modality_tokens is not None:
                output.features[name] = pool_tokens(self.encode(modality_tokens), self.patch_embed(name).config)
            elif sharded:
                output.idle.append(self.encode(self._zero_token()))
        trainable = keep_in_graph or any(parameter.requires_grad for parameter in self.encoder.parameters())
        if not output.features and not output.idle and learns and trainable:
            output.idle.append(self.encode(self._zero_token()))
        return output

    def _is_trainable(self, modality: str) -> bool:
        return any(parameter.requires_grad for parameter in self.patch_embed(modality).parameters())

    def encode(self, tokens: Tensor) -> Tensor:
        """The encoder alone: shape (N, L, hidden_size) to the same."""
        features: Tensor = self.encoder(tokens).last_hidden_state
        return features

    def _zero_token(self) -> Tensor:
        parameter = next(self.parameters())
        # FSDP2 reduces a layer's gradients where one flows back out of its input: real tokens have one, so must this.
        return torch.zeros(
            1,
            1,
            self.hidden_size,
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=torch.is_grad_enabled(),
        )
