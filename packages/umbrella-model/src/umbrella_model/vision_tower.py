"""Vision tower: one patch embed per modality in front of a vision encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from umbrella_model.config import UmbrellaConfig
from umbrella_model.hf_compat import mark_initialized
from umbrella_model.own_encoder import OwnEncoderConfig, check_token_encoder
from umbrella_model.patch_embed import PatchEmbed, build_patch_embed, is_sharded, is_sharded_by_zero, pool_tokens
from umbrella_model.vision_encoder import build_vision_encoder


@dataclass
class VisionTowerOutput:
    """Output of the vision tower for a batch.

    Attributes:
        features: For each modality present, shape (N_m, num_tokens, hidden_size), pooled.
        dummy_terms: In training, a 0-dim float32 tensor for each absent, trainable modality. Under DeepSpeed ZeRO-3
            also an exact zero for each modality present.
        placeholders: Encoder outputs of zero tokens, shape (1, 1, hidden_size) each. They carry no information; the
            model adds them with weight zero, so that encoder and projector are in the graph of every step.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    dummy_terms: dict[str, Tensor] = field(default_factory=dict)
    placeholders: list[Tensor] = field(default_factory=list)


class UmbrellaVisionTower(nn.Module):
    """`{modality}_patch_embed` modules in front of one encoder, called in the same order for every batch.

    Args:
        config: The model's configuration.
        vision_encoder: A module on patch tokens, from `load_vision_encoder`; None to build the encoder of the config.
    """

    def __init__(self, config: UmbrellaConfig, *, vision_encoder: nn.Module | None = None) -> None:
        super().__init__()
        config.sync_modality_order()
        if not config.patch_embeds:
            raise ValueError(
                "a model needs at least one modality: UmbrellaConfig(modalities={'T1': PatchEmbedConfig(...)})"
            )
        self.has_own_encoder = isinstance(config.vision_config, OwnEncoderConfig)
        if vision_encoder is None and self.has_own_encoder:
            vision_encoder = build_vision_encoder(config)  # finds hidden_size
        self.modality_order = tuple(config.patch_embeds)
        self.hidden_size: int = config.vision_config.hidden_size
        for name, patch_embed in config.patch_embeds.items():
            self.add_module(f"{name}_patch_embed", build_patch_embed(patch_embed, hidden_size=self.hidden_size))
        # After the patch embeds: the order decides which random weights a seed gives.
        encoder = build_vision_encoder(config) if vision_encoder is None else vision_encoder
        self.own_buffers: dict[str, Tensor] = {}
        if self.has_own_encoder:
            longest = max(each.num_patches for each in config.patch_embeds.values())
            check_token_encoder(encoder, hidden_size=self.hidden_size, lengths=[longest])
            mark_initialized(encoder)
            self.own_buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        self.encoder = encoder

    def finish_loading(self, new_keys: Collection[str]) -> None:
        """Completes a module of one's own after loading a checkpoint.

        Hugging Face's loading replaces buffers that are not in the state dict, and tensors that are missing in the
        checkpoint, by uninitialised memory; only its own models can compute them again.

        Args:
            new_keys: Keys that are missing in the checkpoint, or have another shape there.

        Raises:
            ValueError: One of them belongs to the module.
        """
        if not self.has_own_encoder:
            return
        new = sorted(key for key in new_keys if "vision_tower.encoder." in key)
        if new:
            raise ValueError(f"the vision encoder given is not that of the checkpoint, which lacks {', '.join(new)}")
        saved = self.encoder.state_dict().keys()
        for name, value in self.own_buffers.items():
            if name not in saved:
                self.encoder.get_buffer(name).copy_(value)

    def patch_embed(self, modality: str) -> PatchEmbed:
        """The patch embed of a modality.

        Raises:
            KeyError: The model does not have the modality; the message lists those that it has.
        """
        if modality not in self.modality_order:
            raise KeyError(f"unknown modality {modality!r}; the model has {', '.join(self.modality_order)}")
        module = getattr(self, f"{modality}_patch_embed")
        assert isinstance(module, PatchEmbed)
        return module

    def forward(self, pixel_values: Mapping[str, Tensor] | None, *, keep_in_graph: bool = False) -> VisionTowerOutput:
        """Encodes the scans of a batch.

        Every patch embed is called in `modality_order`, with or without volumes. A sharded engine matches its
        collectives by call order, so there the encoder is also called once per modality.

        Args:
            pixel_values: For each modality present, shape (N_m, C, *image_size).
            keep_in_graph: Whether modules after the encoder are trainable, so that it has to run on a zero token if
                the batch has no scans.

        Returns:
            Features, dummy terms and placeholders.

        Raises:
            KeyError: `pixel_values` has a modality that the model does not have.
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
                    # ZeRO-3 needs modules to return the same number of tensors on every rank.
                    output.dummy_terms[name] = torch.zeros((), device=pixel_values[name].device, requires_grad=True)
            elif learns or sharded:
                term = self.patch_embed(name)(None)
                if learns and term is not None:
                    output.dummy_terms[name] = term
        for name, modality_tokens in tokens.items():
            if modality_tokens is not None:
                output.features[name] = pool_tokens(self.encode(modality_tokens), self.patch_embed(name).config)
            elif sharded:
                output.placeholders.append(self.encode(self._zero_token()))
        trainable = keep_in_graph or any(parameter.requires_grad for parameter in self.encoder.parameters())
        if not output.features and not output.placeholders and learns and trainable:
            output.placeholders.append(self.encode(self._zero_token()))
        return output

    def _is_trainable(self, modality: str) -> bool:
        return any(parameter.requires_grad for parameter in self.patch_embed(modality).parameters())

    def encode(self, tokens: Tensor) -> Tensor:
        """Encoder output of tokens; both have shape (N, L, hidden_size)."""
        features: Tensor = self.encoder(tokens)
        return features

    def _zero_token(self) -> Tensor:
        parameter = next(self.parameters())
        # FSDP2 reduces the gradients of a layer when its input gets a gradient, so that the zero token requires one.
        learns = torch.is_grad_enabled()
        return torch.zeros(1, 1, self.hidden_size, dtype=parameter.dtype, device=parameter.device, requires_grad=learns)
