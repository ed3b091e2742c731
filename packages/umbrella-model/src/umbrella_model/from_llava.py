"""Conversion of a pretrained LLaVA to an UMBRELLA model: kept modules are moved, and every tensor is accounted for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from umbrella_model.backbone import hold_in_memory
from umbrella_model.config import LLAVA_MODEL_TYPES, PatchEmbedConfig, UmbrellaConfig
from umbrella_model.from_parts import PatchEmbedInit, build_empty, check_init, compose
from umbrella_model.generation import usable_generation_config
from umbrella_model.key_checks import check_loaded_keys, mute_load_report
from umbrella_model.vision_encoder import family_of, load_vision_encoder

Model = TypeVar("Model", bound=PreTrainedModel)

logger = logging.getLogger(__name__)

KEPT_SETTINGS = (
    "image_token_index", "projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias",
    "tie_word_embeddings",
)  # fmt: skip
# Options of `from_pretrained` that locate a checkpoint; they apply to its config as well.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class LlavaConversion:
    """Names of the parameters and buffers that a conversion kept, dropped and added.

    Attributes:
        kept: LLaVA's tensors that are in the model, bit-identical.
        dropped: LLaVA's tensors that are not: 2-D embeddings, layers after the feature layer, norms, heads, separators
            of image tiles; without `strict` also unexpected tensors of the file.
        new: The model's tensors that LLaVA does not have: the patch embeds, CLIP's class token with its position;
            without `strict` also tensors missing in the file.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]


def load_llava(
    model_class: type[Model],
    name_or_path: str,
    *,
    modalities: Mapping[str, PatchEmbedConfig],
    init: PatchEmbedInit = "inflate",
    vision_feature_layer: int | None = None,
    strict: bool = True,
    **kwargs: Any,
) -> Model:
    """Loads a LLaVA checkpoint as a `model_class`; see `UmbrellaForConditionalGeneration.from_llava`."""
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    old_config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub_options)
    model_type = old_config.model_type
    if model_type not in LLAVA_MODEL_TYPES:
        raise ValueError(
            f"{name_or_path} is a {model_type!r} checkpoint; from_llava supports {', '.join(LLAVA_MODEL_TYPES)}"
        )
    # Reading the weights can take minutes, so the arguments are checked first.
    check_init(init)
    build_empty(model_class, _config_from(old_config, modalities, vision_feature_layer=vision_feature_layer))
    # Transformers' own error does not name the tensors; `check_loaded_keys` does.
    kwargs.setdefault("ignore_mismatched_sizes", True)
    with mute_load_report() if strict else nullcontext():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    llava, info = loaded
    model, conversion = convert_llava(
        model_class,
        llava,
        modalities=modalities,
        init=init,
        vision_feature_layer=vision_feature_layer,
        loading_info=info,
    )
    if strict:
        check_loaded_keys(_without_unused(info, model, init=init), source=str(name_or_path))
    logger.info(
        "from_llava: %d tensors kept, %d dropped (%s), %d new, init: %s (%s)",
        len(conversion.kept), len(conversion.dropped), ", ".join(conversion.dropped),
        len(conversion.new), init, ", ".join(conversion.new),
    )  # fmt: skip
    return model


def convert_llava(
    model_class: type[Model],
    llava: Any,
    *,
    modalities: Mapping[str, PatchEmbedConfig],
    init: PatchEmbedInit = "inflate",
    vision_feature_layer: int | None = None,
    loading_info: Mapping[str, Collection[Any]] | None = None,
) -> tuple[Model, LlavaConversion]:
    """Builds an UMBRELLA model from the modules of a LLaVA, which must not be used afterwards.

    Args:
        model_class: `UmbrellaForConditionalGeneration` or a subclass.
        llava: The pretrained model.
        modalities: Patch embed configuration of each modality.
        init: `inflate` initialises the patch embeds from the 2-D filter and positions, `random` at random.
        vision_feature_layer: The encoder layer that provides the features; None for that of the LLaVA's config.
        loading_info: The loading info of Hugging Face's `from_pretrained`; None if no tensor was missing.

    Returns:
        The model, and the names of kept, dropped and new tensors.

    Raises:
        ValueError: An unknown `init`, a feature layer out of range, or several feature layers.
    """
    check_init(init)
    source = dict(llava.state_dict())
    config = _config_from(llava.config, modalities, vision_feature_layer=vision_feature_layer)
    build_empty(model_class, config)  # raises errors before a module of the LLaVA is changed
    assert isinstance(config.vision_feature_layer, int)
    model = compose(
        model_class,
        config,
        encoder=load_vision_encoder(llava.model.vision_tower, feature_layer=config.vision_feature_layer),
        projector=llava.model.multi_modal_projector,
        language_model=llava.model.language_model,
        head=llava.lm_head,
        init=init,
    )
    model.generation_config = usable_generation_config(llava.generation_config)
    hold_in_memory(model)
    return model.train(llava.training), _compare_tensors(source, model, loading_info or {})


def _config_from(
    old: Any, modalities: Mapping[str, PatchEmbedConfig], *, vision_feature_layer: int | None
) -> UmbrellaConfig:
    settings = {name: getattr(old, name) for name in KEPT_SETTINGS}
    if vision_feature_layer is not None:
        settings["vision_feature_layer"] = vision_feature_layer
    # Volumes have no class token to drop.
    settings |= {"modalities": dict(modalities), "vision_feature_select_strategy": "full"}
    return UmbrellaConfig(vision_config=old.vision_config.to_dict(), text_config=old.text_config.to_dict(), **settings)


def _new_name(name: str) -> str:
    """The name that a kept tensor of the LLaVA has in the model."""
    return name.replace("model.vision_tower.", "model.vision_tower.encoder.")


def _without_unused(
    info: Mapping[str, Collection[Any]], model: PreTrainedModel, *, init: PatchEmbedInit
) -> Mapping[str, Collection[Any]]:
    """The loading info without missing keys that the model does not use."""
    target = model.state_dict().keys()
    sources = family_of(model.config.vision_config).embedding_keys(patches=init == "inflate")
    missing = {key for key in info["missing_keys"] if _new_name(key) in target or key.endswith(sources)}
    return {**info, "missing_keys": missing}


def _compare_tensors(
    source: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    loading_info: Mapping[str, Collection[Any]],
) -> LlavaConversion:
    target = dict(model.state_dict())
    # Tensors that are missing or mismatched in the file were initialised by `from_pretrained`: they are new.
    random = {*loading_info.get("missing_keys", ()), *(key for key, *_ in loading_info.get("mismatched_keys", ()))}
    source = {name: tensor for name, tensor in source.items() if name not in random}
    renamed = {name: _new_name(name) for name in source}
    kept = tuple(name for name, new in renamed.items() if new in target and torch.equal(source[name], target[new]))
    dropped = (*(name for name in source if name not in kept), *sorted(loading_info.get("unexpected_keys", ())))
    known = {renamed[name] for name in kept}
    return LlavaConversion(kept=kept, dropped=dropped, new=tuple(name for name in target if name not in known))
