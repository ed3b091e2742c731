"""From a pretrained LLaVA to an UMBRELLA model: what is kept is moved over, what is replaced is listed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from umbrella_model.config import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.modeling import UmbrellaForConditionalGeneration
from umbrella_model.vision_tower import reduce_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlavaConversion:
    """The account of a conversion, in names of parameters and buffers.

    Attributes:
        kept: LLaVA's tensors that live on, bit for bit.
        dropped: LLaVA's tensors without a place: 2-D embeddings, layers behind the feature layer, norms and heads.
        new: The model's tensors that LLaVA does not have: the patch embeds.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]


def load_llava(
    name_or_path: str, *, modalities: Mapping[str, PatchEmbedConfig], **kwargs: Any
) -> UmbrellaForConditionalGeneration:
    """Loads a LLaVA checkpoint and converts it; see `UmbrellaForConditionalGeneration.from_llava`."""
    llava = LlavaForConditionalGeneration.from_pretrained(name_or_path, **kwargs)
    model, account = convert_llava(llava, modalities=modalities)
    logger.info(
        "from_llava: %d tensors kept, %d dropped (%s), %d new (%s)",
        len(account.kept), len(account.dropped), ", ".join(account.dropped), len(account.new), ", ".join(account.new),
    )  # fmt: skip
    return model


def convert_llava(
    llava: LlavaForConditionalGeneration, *, modalities: Mapping[str, PatchEmbedConfig]
) -> tuple[UmbrellaForConditionalGeneration, LlavaConversion]:
    """Builds an UMBRELLA model around the parts of a LLaVA, which must not be used afterwards.

    Args:
        llava: The pretrained model.
        modalities: Patch embeds by modality.

    Returns:
        The model and the account of what became of each tensor.
    """
    source = dict(llava.state_dict())
    old = llava.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        old.pop(key, None)
    # There is no class token among the patches of a volume, so there is none to leave out.
    old |= {"modalities": dict(modalities), "vision_feature_select_strategy": "full"}
    config = UmbrellaConfig(**old)
    # Weights are moved, never copied: only the patch embeds take new memory.
    with torch.device("meta"):
        model = UmbrellaForConditionalGeneration(config)
    # Whole modules are moved where possible: each goes on sharing one config object with its layers.
    model.model.vision_tower.encoder = reduce_encoder(llava.model.vision_tower, depth=config.vision_depth)
    model.model.multi_modal_projector = llava.model.multi_modal_projector
    model.model.language_model = llava.model.language_model
    model.lm_head = llava.lm_head
    parameter = next(llava.parameters())
    for name in config.patch_embeds:
        patch_embed = model.model.vision_tower.patch_embed(name)
        patch_embed.to_empty(device=parameter.device)
        patch_embed.reset_parameters()
        patch_embed.to(parameter.dtype)
    model.generation_config = llava.generation_config
    return model.train(llava.training), _account(source, model)


def _account(source: Mapping[str, torch.Tensor], model: UmbrellaForConditionalGeneration) -> LlavaConversion:
    target = dict(model.state_dict())
    renamed = {name: name.replace("model.vision_tower.", "model.vision_tower.encoder.") for name in source}
    kept = tuple(name for name, new in renamed.items() if new in target and torch.equal(source[name], target[new]))
    dropped = tuple(name for name in source if name not in kept)
    known = {renamed[name] for name in kept}
    return LlavaConversion(kept=kept, dropped=dropped, new=tuple(name for name in target if name not in known))
