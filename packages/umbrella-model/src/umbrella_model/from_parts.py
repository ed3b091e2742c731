"""Composition of a model from a language model, a vision encoder and new patch embeds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from umbrella_model.backbone import hold_in_memory
from umbrella_model.config import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.generation import usable_generation_config
from umbrella_model.language_model import LanguageModelSource, load_language_model
from umbrella_model.projector import build_projector
from umbrella_model.tokens import add_embeddings, prepare_tokenizer
from umbrella_model.vision_encoder import LoadedEncoder, PatchWeights, inflate_patch_embed, load_vision_encoder

Model = TypeVar("Model", bound=PreTrainedModel)
PatchEmbedInit = Literal["inflate", "random"]
ProjectorKind = Literal["mlp", "linear"]

logger = logging.getLogger(__name__)


def compose_parts(
    model_class: type[Model],
    *,
    language_model: LanguageModelSource,
    vision_encoder: LoadedEncoder | nn.Module | PretrainedConfig | str | Path,
    modalities: Mapping[str, PatchEmbedConfig],
    tokenizer: PreTrainedTokenizerBase | None,
    projector: ProjectorKind,
    init: PatchEmbedInit,
    vision_feature_layer: int | None,
    vision_num_heads: int | None,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
) -> Model:
    """A `model_class` from its parts; see `UmbrellaForConditionalGeneration.from_parts`."""
    check_init(init)
    if projector not in get_args(ProjectorKind):
        raise ValueError(f"projector is {projector!r}; it must be one of {', '.join(get_args(ProjectorKind))}")
    language: Any = load_language_model(language_model, dtype=dtype, attn_implementation=attn_implementation)
    encoder = _encoder(
        vision_encoder, feature_layer=vision_feature_layer, num_heads=vision_num_heads, dtype=language.dtype
    )
    num_rows = language.get_input_embeddings().num_embeddings
    if tokenizer is None:
        image_token, num_tokens = num_rows, num_rows + 1
    else:
        image_token = prepare_tokenizer(tokenizer)
        num_tokens = max(tokenizer.get_vocab().values()) + 1
    add_embeddings(language, num_tokens=num_tokens)
    config = UmbrellaConfig(
        vision_config=encoder.config.to_dict(),
        text_config=language.config.to_dict(),
        modalities=dict(modalities),
        image_token_index=image_token,
        projector=projector,
        vision_feature_layer=-1 if encoder.feature_layer is None else encoder.feature_layer,
        vision_final_norm=encoder.feature_layer is None,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    check_positions(config)
    model = compose(
        model_class,
        config,
        encoder=encoder,
        projector=None,
        language_model=language.base_model,
        head=language.get_output_embeddings(),
        init=init,
    )
    model.generation_config = usable_generation_config(language.generation_config)
    hold_in_memory(model)
    logger.info(
        "from_parts: %s, %s, new: projector (%s) and patch embeds (%s)",
        config.text_config.model_type, config.vision_config.model_type, projector,
        "random" if encoder.patches is None else init,
    )  # fmt: skip
    return model.eval()


def _encoder(
    source: LoadedEncoder | nn.Module | PretrainedConfig | str | Path,
    *,
    feature_layer: int | None,
    num_heads: int | None,
    dtype: torch.dtype,
) -> LoadedEncoder:
    """The vision encoder, which may be loaded already."""
    if not isinstance(source, LoadedEncoder):
        return load_vision_encoder(source, feature_layer=feature_layer, dtype=dtype, num_heads=num_heads)
    if feature_layer is not None or num_heads is not None:
        raise ValueError(
            "vision_feature_layer and vision_num_heads do not apply to an encoder from load_vision_encoder; pass "
            "feature_layer and num_heads to it"
        )
    source.module.to(dtype)
    return source


def check_init(init: str) -> None:
    """Rejects an unknown `init`."""
    if init not in get_args(PatchEmbedInit):
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(get_args(PatchEmbedInit))}")


def check_positions(config: UmbrellaConfig) -> None:
    """Rejects scans of more tokens than the language model has positions.

    Raises:
        ValueError: With every such modality.
    """
    positions = getattr(config.text_config, "max_position_embeddings", None)
    sizes = {name: each.num_tokens for name, each in config.patch_embeds.items()}
    if too_long := {name: size for name, size in sizes.items() if isinstance(positions, int) and size >= positions}:
        raise ValueError(
            f"the language model has {positions} positions, and a scan takes {too_long} tokens; choose larger patches, "
            "or pool them"
        )


def build_empty(model_class: type[Model], config: UmbrellaConfig, **options: Any) -> Model:
    """The model on the meta device: weights are moved into it, and memory is allocated only for what is new."""
    with torch.device("meta"):
        return model_class(config, **options)


def compose(
    model_class: type[Model],
    config: UmbrellaConfig,
    *,
    encoder: LoadedEncoder,
    projector: nn.Module | None,
    language_model: Any,
    head: nn.Module,
    init: PatchEmbedInit,
) -> Model:
    """Moves the modules of a language model and of an encoder into a new model, without a copy.

    Args:
        model_class: `UmbrellaForConditionalGeneration` or a subclass.
        config: Of the model.
        encoder: From `load_vision_encoder`.
        projector: None for a new one.
        language_model: The decoder without its head.
        head: The language-model head.
        init: `inflate` initialises the patch embeds from those of the encoder, if it has any; `random` at random.

    Raises:
        ValueError: The language model is not the one that its config describes, so that a saved model would not load.
    """
    model: Any = build_empty(model_class, config, vision_encoder=encoder.module)
    _check_same_tensors(language_model, model.model.language_model)
    # A moved module shares a config object with its layers. The model's config has to refer to the same object: with a
    # copy, a later resize of the vocabulary would change only one of the two.
    config.vision_config = encoder.config
    config.text_config = language_model.config
    weight = next(language_model.parameters())
    model.model.language_model = language_model
    model.lm_head = head
    if projector is None:
        projector = build_projector(config)
        projector.to(weight.device, weight.dtype)
    model.model.multi_modal_projector = projector
    for name in config.patch_embeds:
        patch_embed = model.model.vision_tower.patch_embed(name)
        patch_embed.to_empty(device=weight.device)
        patch_embed.to(weight.dtype)
        _initialise(patch_embed, encoder.patches if init == "inflate" else None)
    return model


def _check_same_tensors(language_model: nn.Module, rebuilt: nn.Module) -> None:
    ours, theirs = (
        {key: value.shape for key, value in each.state_dict().items()} for each in (language_model, rebuilt)
    )
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        raise ValueError(
            f"{type(language_model).__name__}: a saved model would not load, since {type(rebuilt).__name__}, which its "
            f"config describes, has other tensors ({', '.join(different[:3])}); use another language model"
        )


def _initialise(patch_embed: Any, patches: PatchWeights | None) -> None:
    if patches is None:
        patch_embed.reset_parameters()
    else:
        inflate_patch_embed(patch_embed, patches)
