"""Vision tower, projector and language model: everything except the language-model head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel

from umbrella_model.attention import VARLEN, check_right_padding, no_mask
from umbrella_model.config import UmbrellaConfig
from umbrella_model.hf_compat import CACHE, attention_of
from umbrella_model.key_checks import check_loaded_keys, mute_load_report
from umbrella_model.lora import freeze_base_weights, has_lora, is_lora_name
from umbrella_model.packing import check_not_packed
from umbrella_model.parts import named_part_parameters
from umbrella_model.patch_embed import PatchEmbed, is_sharded
from umbrella_model.projector import build_projector
from umbrella_model.splice import check_image_tokens, splice_features
from umbrella_model.vision_tower import UmbrellaVisionTower


@dataclass
class UmbrellaModelOutput(BaseModelOutputWithPast):
    """Hidden states of the language model, and the dummy terms of absent modalities."""

    dummy_terms: dict[str, Tensor] | None = None


class UmbrellaPreTrainedModel(LlavaPreTrainedModel):
    """Loading, saving and initialisation as in LLaVA; patch embeds use their own `reset_parameters`."""

    config: UmbrellaConfig
    config_class = UmbrellaConfig
    _no_split_modules = ["VolumePatchEmbed", "SeriesPatchEmbed"]  # noqa: RUF012  (Hugging Face's form)
    # Checkpoint keys that this class ignores. Hugging Face's own list of such keys would be inherited by every model
    # that contains this one, with or without a head.
    _ignored_prefix: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        strict: bool = True,
        output_loading_info: bool = False,
        vision_encoder: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `from_pretrained`, except that keys that do not match raise an error by default.

        All parameters are trainable afterwards, except those with LoRA adapters; the model is in eval mode.

        Args:
            pretrained_model_name_or_path: A folder or a name on the hub.
            *model_args: For Hugging Face's `from_pretrained`.
            strict: Whether missing, unexpected and mismatched keys raise an error. With False, missing tensors are
                initialised, for example those of a modality that was added to the configuration.
            output_loading_info: Whether to also return Hugging Face's loading info.
            vision_encoder: The module on patch tokens that the checkpoint was saved with, if it is one of your own;
                its weights are those of the checkpoint.
            **kwargs: For Hugging Face's `from_pretrained`.

        Returns:
            The model, or the model and the loading info.

        Raises:
            ValueError: With `strict`, a key is missing, unexpected or has another shape; the message lists all of them.
        """
        # Transformers' own error does not name the tensors; `check_loaded_keys` does.
        kwargs.setdefault("ignore_mismatched_sizes", True)
        if vision_encoder is not None:
            kwargs["vision_encoder"] = vision_encoder
        with mute_load_report() if strict else nullcontext():
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        model, info = loaded
        if strict:
            if cls._ignored_prefix is not None:
                unexpected = {key for key in info["unexpected_keys"] if not key.startswith(cls._ignored_prefix)}
                info = {**info, "unexpected_keys": unexpected}
            check_loaded_keys(info, source=str(pretrained_model_name_or_path))
        new_keys = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        model.base_model.vision_tower.finish_loading(new_keys)
        hold_in_memory(model)
        if has_lora(model):
            _check_base_weights(model, info["missing_keys"])
            freeze_base_weights(model)  # loading makes every parameter trainable
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Hugging Face's `save_pretrained`.

        Raises:
            ValueError: The modalities of the config were changed after the model was built: the checkpoint would not
                load.
        """
        tower: Any = self.base_model.vision_tower
        built = {name: tower.patch_embed(name).config for name in tower.modality_order}
        if list(self.config.patch_embeds.items()) != list(built.items()):
            raise ValueError(
                f"the config has modalities {self.config.patch_embeds}, but the model was built with {built}; to add a "
                "modality, use from_pretrained(..., modalities=..., strict=False)"
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not custom, for transformers: it would leave buffers of some language models (Falcon-H1) uninitialised."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbed):
            module.reset_parameters()


@torch.no_grad()
def hold_in_memory(model: nn.Module) -> None:
    """Copies weights on the CPU, which may be mapped from a file, into memory.

    A system that is short of memory drops mapped pages of frozen weights, and reads them from the file in every step.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _check_base_weights(model: Any, missing_keys: Collection[str]) -> None:
    """Rejects adapters on newly initialised weights, which would stay frozen at their random values."""
    names = {name for part, name, _ in named_part_parameters(model) if part in model.config.lora["parts"]}
    new = sorted(name for name in missing_keys if name in names and not is_lora_name(name))
    if new:
        raise ValueError(
            f"{new[0]} is missing in the checkpoint, and its random weights would be frozen because its part has LoRA "
            "adapters; load the checkpoint without the new modality, call merge_lora, save, and add the modality to "
            "the merged checkpoint"
        )


class UmbrellaModel(UmbrellaPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model, without the language-model head."""

    _ignored_prefix = "lm_head."  # a checkpoint of the whole model has a head

    def __init__(self, config: UmbrellaConfig, *, vision_encoder: nn.Module | None = None) -> None:
        # LLaVA's own __init__ would build a 2-D tower that is not used.
        super(LlavaModel, self).__init__(config)
        self.vision_tower = UmbrellaVisionTower(config, vision_encoder=vision_encoder)
        self.multi_modal_projector: nn.Module = build_projector(config)  # type: ignore[assignment]  # LLaVA has one kind
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the language model, whatever their name in it."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings, as Hugging Face's `resize_token_embeddings` does."""
        self.language_model.set_input_embeddings(value)

    def embed(
        self,
        input_ids: Tensor,
        *,
        modality_ids: Tensor | None = None,
        pixel_values: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Token embeddings with vision features at the positions of the scans.

        Args:
            input_ids: Shape (B, L).
            modality_ids: Shape (B, L), or None for text only.
            pixel_values: Volumes of each modality present.

        Returns:
            Embeddings of shape (B, L, H) and the dummy terms of absent modalities.

        Raises:
            ValueError: `pixel_values` is not a dict by modality or has no `modality_ids`, the numbers of tags and
                vision tokens differ, or, checked on the CPU only, tags and image tokens are at different positions.
        """
        if pixel_values is not None and not isinstance(pixel_values, Mapping):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}; it must be a dict of tensors by modality, such as "
                f"{{{self.vision_tower.modality_order[0]!r}: pixel_values}}"
            )
        if pixel_values and modality_ids is None:
            raise ValueError("pixel_values without modality_ids: the positions of the scans are unknown; pass both")
        check_image_tokens(input_ids, modality_ids, image_token_id=self.config.image_token_id)
        inputs_embeds: Tensor = self.get_input_embeddings()(input_ids)
        learns = self.training and torch.is_grad_enabled()
        # Under a sharded engine another rank may hold scans, so every rank has to make the tower's collective calls.
        if modality_ids is None and not learns and not is_sharded(self.vision_tower):
            return inputs_embeds, {}
        projector_learns = any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters())
        vision = self.vision_tower(pixel_values, keep_in_graph=projector_learns)
        features, placeholder = self._project(vision.features, vision.placeholders)
        if modality_ids is not None:
            order = self.vision_tower.modality_order
            inputs_embeds = splice_features(inputs_embeds, features, modality_ids, modality_order=order)
        if placeholder is not None:
            # The sum over an empty slice is exactly zero, and so is its gradient; a product with 0 would turn an
            # infinite activation into NaN.
            inputs_embeds = inputs_embeds + placeholder[:0].sum().to(inputs_embeds.dtype)
        return inputs_embeds, vision.dummy_terms

    def _project(
        self, features: dict[str, Tensor], placeholders: list[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Projects features and placeholders in one call, so that the number of calls does not depend on the batch."""
        parts = [*features.values(), *placeholders]
        if not parts:
            return {}, None
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        projected = self.multi_modal_projector(torch.cat(flat)).split([len(part) for part in flat])
        named = {
            name: tokens.view(*features[name].shape[:2], -1) for name, tokens in zip(features, projected, strict=False)
        }
        return named, torch.cat(projected[len(features) :]) if placeholders else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        pixel_values: Mapping[str, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> UmbrellaModelOutput:
        """Runs vision tower and language model on either `input_ids` or `inputs_embeds`.

        `cache` is the name of `past_key_values` in newer versions of transformers; both are accepted.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        dummy_terms: dict[str, Tensor] = {}
        if input_ids is not None and cache is not None and modality_ids is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # a decoding step: the scans are in the cache
        elif input_ids is not None:
            inputs_embeds, dummy_terms = self.embed(input_ids, modality_ids=modality_ids, pixel_values=pixel_values)
        if cache is None and kwargs.get("cu_seq_lens_q") is None:
            # Some attention paths detect packed conversations from the positions alone, others do not.
            check_not_packed(position_ids, attention_mask)
        kwargs["return_dict"] = True
        if cache is None and (self.training or "cu_seq_lens_q" in kwargs):
            # The cache would be unused, and with one transformers ignores that a row is packed.
            kwargs["use_cache"] = False
        attention_mask = self._causal_mask(inputs_embeds, attention_mask, cache, packed="cu_seq_lens_q" in kwargs)
        if position_ids is None and attention_mask is not None and attention_mask.numel() == 0:
            # Some language models (OPT) would compute the positions from the mask, which is empty.
            assert inputs_embeds is not None
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        return UmbrellaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            dummy_terms=dummy_terms,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _causal_mask(
        self, inputs_embeds: Any, attention_mask: Tensor | None, cache: Cache | None, *, packed: bool
    ) -> Tensor | None:
        """The mask for the language model: under `varlen` none for packed rows and right-padded training batches."""
        if attention_of(self.language_model.config) != VARLEN or cache is not None:
            return attention_mask
        if not packed and not self.training:
            return attention_mask
        if attention_mask is not None:
            check_right_padding(attention_mask)
        return no_mask(inputs_embeds, packed=packed)
