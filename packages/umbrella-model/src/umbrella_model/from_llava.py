"""From a pretrained LLaVA to an UMBRELLA model: what is kept is moved over, what is replaced is listed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from transformers import (
    AutoConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from umbrella_model.config import LLAVA_MODEL_TYPES, PatchEmbedConfig, UmbrellaConfig
from umbrella_model.inflate import inflate_patch_embed
from umbrella_model.key_checks import check_loaded_keys, without_report
from umbrella_model.vision_tower import reduce_encoder

Model = TypeVar("Model", bound=PreTrainedModel)

logger = logging.getLogger(__name__)

PatchEmbedInit = Literal["inflate", "random"]
Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration

LLAVA_CLASSES: Mapping[str, type[Llava]] = dict(
    zip(
        LLAVA_MODEL_TYPES,
        (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration),
        strict=True,
    )
)
KEPT_SETTINGS = (
    "image_token_index", "projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias",
    "tie_word_embeddings",
)  # fmt: skip
# What `inflate` starts from.
INFLATED = (
    "embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
)  # fmt: skip
# Options of `from_pretrained` that say where a checkpoint lies; its config lies there too.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class LlavaConversion:
    """The account of a conversion, in names of parameters and buffers.

    Attributes:
        kept: LLaVA's tensors that live on, bit for bit.
        dropped: LLaVA's tensors without a place: 2-D embeddings (from which `inflate` starts the patch embeds), layers
            behind the feature layer, norms and heads, separators of image tiles; without `strict` also what the file
            has and a LLaVA has not.
        new: The model's tensors that LLaVA does not have: the patch embeds; without `strict` also what the file lacks.
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
    old_config = AutoConfig.from_pretrained(name_or_path, **hub_options)
    model_type = old_config.model_type
    if model_type not in LLAVA_CLASSES:
        raise ValueError(f"{name_or_path} is a {model_type!r} checkpoint; from_llava takes {', '.join(LLAVA_CLASSES)}")
    # To read the weights can take minutes: what does not depend on them is refused before.
    _check_init(init)
    _build_empty(model_class, _config_from(old_config, modalities, vision_feature_layer=vision_feature_layer))
    # Transformers' own error would not name the tensors; ours does. What is not strict loads the rest.
    kwargs.setdefault("ignore_mismatched_sizes", True)
    with without_report() if strict else nullcontext():
        loaded: Any = LLAVA_CLASSES[model_type].from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    llava, info = loaded
    model, account = convert_llava(
        model_class,
        llava,
        modalities=modalities,
        init=init,
        vision_feature_layer=vision_feature_layer,
        loading_info=info,
    )
    if strict:
        check_loaded_keys(_without_needless(info, model, init=init), source=str(name_or_path))
    logger.info(
        "from_llava: %d tensors kept, %d dropped (%s), %d new, init: %s (%s)",
        len(account.kept), len(account.dropped), ", ".join(account.dropped),
        len(account.new), init, ", ".join(account.new),
    )  # fmt: skip
    return model


def convert_llava(
    model_class: type[Model],
    llava: Llava,
    *,
    modalities: Mapping[str, PatchEmbedConfig],
    init: PatchEmbedInit = "inflate",
    vision_feature_layer: int | None = None,
    loading_info: Mapping[str, Collection[Any]] | None = None,
) -> tuple[Model, LlavaConversion]:
    """Builds an UMBRELLA model around the parts of a LLaVA, which must not be used afterwards.

    Args:
        model_class: `UmbrellaForConditionalGeneration` or a subclass.
        llava: The pretrained model.
        modalities: Patch embeds by modality.
        init: `inflate` starts the patch embeds from the 2-D filter and positions, `random` from nothing.
        vision_feature_layer: The encoder layer to take features from; None: as the LLaVA's config says.
        loading_info: What Hugging Face's `from_pretrained` said of the file; None: all tensors are the LLaVA's own.

    Returns:
        The model and the account of what became of each tensor.

    Raises:
        ValueError: An unknown `init`, a feature layer that the encoder has not, or a LLaVA that joins several.
    """
    _check_init(init)
    source = dict(llava.state_dict())
    config = _config_from(llava.config, modalities, vision_feature_layer=vision_feature_layer)
    model: Any = _build_empty(model_class, config)
    embeddings = llava.model.vision_tower.embeddings
    # Whole modules are moved where possible: each goes on sharing one config object with its layers, and the model's
    # config must hold that very object, or a later resize of the vocabulary changes one of two.
    config.vision_config = llava.model.vision_tower.config
    config.text_config = llava.model.language_model.config
    model.model.vision_tower.encoder = reduce_encoder(llava.model.vision_tower, depth=config.vision_depth)
    model.model.multi_modal_projector = llava.model.multi_modal_projector
    model.model.language_model = llava.model.language_model
    model.lm_head = llava.lm_head
    parameter = next(llava.parameters())
    for name in config.patch_embeds:
        patch_embed = model.model.vision_tower.patch_embed(name)
        patch_embed.to_empty(device=parameter.device)
        patch_embed.to(parameter.dtype)
        if init == "inflate":
            inflate_patch_embed(patch_embed, embeddings=embeddings)
        else:
            patch_embed.reset_parameters()
    model.generation_config = llava.generation_config
    return model.train(llava.training), _account(source, model, loading_info or {})


def _check_init(init: str) -> None:
    if init not in get_args(PatchEmbedInit):
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(get_args(PatchEmbedInit))}")


def _config_from(
    old: Any, modalities: Mapping[str, PatchEmbedConfig], *, vision_feature_layer: int | None
) -> UmbrellaConfig:
    settings = {name: getattr(old, name) for name in KEPT_SETTINGS}
    if vision_feature_layer is not None:
        settings["vision_feature_layer"] = vision_feature_layer
    # There is no class token among the patches of a volume, so there is none to leave out.
    settings |= {"modalities": dict(modalities), "vision_feature_select_strategy": "full"}
    return UmbrellaConfig(vision_config=old.vision_config.to_dict(), text_config=old.text_config.to_dict(), **settings)


def _build_empty(model_class: type[Model], config: UmbrellaConfig) -> Model:
    """The model without memory: weights are moved in, never copied, and only the patch embeds take new memory."""
    with torch.device("meta"):
        return model_class(config)


def _new_name(name: str) -> str:
    """The name in the model of a tensor of the LLaVA, if it lives on."""
    return name.replace("model.vision_tower.", "model.vision_tower.encoder.")


def _without_needless(
    info: Mapping[str, Collection[Any]], model: PreTrainedModel, *, init: PatchEmbedInit
) -> Mapping[str, Collection[Any]]:
    """The account of keys, less missing ones that the model would have dropped: a checkpoint may do without them."""
    target = model.state_dict().keys()
    inflated = INFLATED if init == "inflate" else ()
    missing = {key for key in info["missing_keys"] if _new_name(key) in target or key.endswith(inflated)}
    return {**info, "missing_keys": missing}


def _account(
    source: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    loading_info: Mapping[str, Collection[Any]],
) -> LlavaConversion:
    target = dict(model.state_dict())
    # A tensor that the file lacks, or has in another shape, was made up when the LLaVA was read: it is not LLaVA's.
    made_up = {*loading_info.get("missing_keys", ()), *(key for key, *_ in loading_info.get("mismatched_keys", ()))}
    source = {name: tensor for name, tensor in source.items() if name not in made_up}
    renamed = {name: _new_name(name) for name in source}
    kept = tuple(name for name, new in renamed.items() if new in target and torch.equal(source[name], target[new]))
    dropped = (*(name for name in source if name not in kept), *sorted(loading_info.get("unexpected_keys", ())))
    known = {renamed[name] for name in kept}
    return LlavaConversion(kept=kept, dropped=dropped, new=tuple(name for name in target if name not in known))
