"""Vision encoders behind the patch embeds: loaded from anything that is supported, or built from a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from umbrella_model.config import UmbrellaConfig, feature_depth
from umbrella_model.encoder_families import EncoderFamily, adapt_encoder, family_of, supported_encoders
from umbrella_model.inflate import PatchWeights, inflate_patch_embed
from umbrella_model.key_checks import check_loaded_keys, check_source, mute_load_report
from umbrella_model.monai_vit import STATE_DICT_FILES, VolumeViT, find_volume_vit, read_state_dict
from umbrella_model.own_encoder import OwnEncoderConfig, build_own_encoder, token_width

__all__ = [
    "LoadedEncoder", "PatchWeights", "build_vision_encoder", "family_of", "inflate_patch_embed", "load_vision_encoder",
]  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEncoder:
    """A vision encoder on patch tokens.

    Attributes:
        module: Maps tokens of shape (N, L, D) to features of the same shape.
        config: From which `build_vision_encoder` builds the same architecture.
        patches: Its own patch filter and positions; None if it has none to inflate.
        feature_layer: None for its own output after the final norm; a number as for `load_vision_encoder`.
    """

    module: nn.Module
    config: PretrainedConfig
    patches: PatchWeights | None
    feature_layer: int | None = None


def build_vision_encoder(config: UmbrellaConfig) -> nn.Module:
    """Builds the vision encoder of a model's config, with random weights.

    Raises:
        ValueError: The encoder is not supported, the feature layer is out of range or does not apply, or the encoder
            is a module of one's own that is not registered.
    """
    vision_config = config.vision_config
    if isinstance(vision_config, OwnEncoderConfig):
        if config.vision_feature_layer != -1:
            raise ValueError(_no_feature_layer(config.vision_feature_layer))
        return build_own_encoder(vision_config)
    family = family_of(vision_config)
    if vision_config.model_type != family.model_type:
        raise ValueError(f"vision_config is of type {vision_config.model_type!r}; pass its vision_config")
    depth = config.vision_depth
    model = AutoModel.from_config(vision_config)
    adapt_encoder(model, depth=depth, final_norm=config.vision_final_norm)
    return model


def load_vision_encoder(
    source: nn.Module | PretrainedConfig | str | Path,
    *,
    feature_layer: int | None,
    dtype: torch.dtype | str | None = None,
    num_heads: int | None = None,
    image_size: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
) -> LoadedEncoder:
    """Loads a vision encoder and makes it take patch tokens.

    Args:
        source: A loaded module, which is changed and must not be used afterwards; a folder or a name on the hub; a
            Hugging Face config (random weights); or a file with the state dict of a MONAI ViT (`.safetensors`, `.pt`,
            `.pth`, `.ckpt`). A module that is none of Hugging Face's or MONAI's is used as it is.
        feature_layer: None for the encoder's own output, with its final norm; a number for the output of that layer
            without the norm, as in LLaVA (0 is the embeddings, -1 the last layer).
        dtype: Of the weights; None for that of the source.
        num_heads: Attention heads of a MONAI ViT in a file; a state dict does not have their number.
        image_size: Voxels along each axis that a MONAI ViT was trained on; needed if its grid is not cubic.
        patch_size: Voxels of a patch of a MONAI ViT with `proj_type="perceptron"` in a file; needed if the patches are
            not cubes of one channel.

    Returns:
        The encoder, its config, and its patch filter and positions.

    Raises:
        ValueError: The source is not supported, its keys or sizes do not fit, or an argument does not apply to it.
        OSError: A folder, file or hub repository does not exist.
    """
    check_source(source, kinds=(nn.Module, PretrainedConfig), argument="vision_encoder", suffixes=STATE_DICT_FILES)
    volume: VolumeViT | None = None
    if isinstance(source, (str, Path)) and Path(source).is_file():
        volume = find_volume_vit(read_state_dict(Path(source)), source=str(source), num_heads=num_heads)
        if volume is None:
            raise ValueError(f"{source} has no keys of a MONAI ViT; supported are {supported_encoders()}")
    elif isinstance(source, nn.Module) and not isinstance(source, PreTrainedModel):
        name = type(source).__name__
        volume = find_volume_vit(source.state_dict(), source=name, num_heads=num_heads, module=source)
    if volume is not None:
        loaded = _from_volume_vit(volume, feature_layer=feature_layer, image_size=image_size, patch_size=patch_size)
        return _in_dtype(loaded, dtype)
    for argument, value in (("num_heads", num_heads), ("image_size", image_size), ("patch_size", patch_size)):
        if value is not None:
            raise ValueError(f"{argument} is for a MONAI ViT; leave it out for {_name_of(source)}")
    if isinstance(source, PreTrainedModel):
        family = family_of(source.config, name=type(source).__name__)
        return _in_dtype(_adapt(_find(source, family), feature_layer=feature_layer), dtype)
    if isinstance(source, (nn.Module, OwnEncoderConfig)):
        if feature_layer is not None:
            raise ValueError(_no_feature_layer(feature_layer))
        return _in_dtype(_own(source), dtype)
    if isinstance(source, PretrainedConfig):
        family = family_of(source, name=type(source).__name__)
        model = AutoModel.from_config(_vision_part(source, family))
        loaded = _adapt(model, feature_layer=feature_layer)
        return _in_dtype(LoadedEncoder(loaded.module, loaded.config, None, feature_layer), dtype)
    return _from_checkpoint(str(source), feature_layer=feature_layer, dtype=dtype)


def _name_of(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _no_feature_layer(layer: Any) -> str:
    return (
        f"vision_feature_layer is {layer}; it does not apply to a module of your own, whose output is taken as it is: "
        "leave it out"
    )


def _in_dtype(loaded: LoadedEncoder, dtype: torch.dtype | str | None) -> LoadedEncoder:
    if dtype is not None and dtype != "auto":
        loaded.module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return loaded


def _own(source: nn.Module | OwnEncoderConfig) -> LoadedEncoder:
    if isinstance(source, OwnEncoderConfig):
        return LoadedEncoder(build_own_encoder(source), source, None)
    try:
        width = token_width(source)
    except ValueError as error:
        raise ValueError(f"{error}. Supported are {supported_encoders()}") from error
    return LoadedEncoder(source, OwnEncoderConfig(hidden_size=width), None)


def _vision_part(config: PretrainedConfig, family: EncoderFamily) -> PretrainedConfig:
    """The vision config of a model with several towers, otherwise the config itself."""
    part = config if config.model_type == family.model_type else config.vision_config
    assert isinstance(part, PretrainedConfig)
    return part


def _find(model: PreTrainedModel, family: EncoderFamily) -> Any:
    """The encoder inside of a model with heads, a decoder or a text tower."""
    found = next((module for module in model.modules() if isinstance(module, family.source)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__!r} has no {family.source.__name__} inside; pass that model")
    return found


def _adapt(model: Any, *, feature_layer: int | None) -> LoadedEncoder:
    config = model.config
    layer = -1 if feature_layer is None else feature_layer
    depth = feature_depth(layer, num_layers=config.num_hidden_layers)
    patches = adapt_encoder(model, depth=depth, final_norm=feature_layer is None)
    return LoadedEncoder(model, config, patches, feature_layer)


def _from_checkpoint(name_or_path: str, *, feature_layer: int | None, dtype: torch.dtype | str | None) -> LoadedEncoder:
    """Loads the vision part of a Hugging Face checkpoint; text towers, heads and decoders are not read."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    family = family_of(config, name=name_or_path)
    config = _vision_part(config, family)
    if feature_layer is not None:
        feature_depth(feature_layer, num_layers=config.num_hidden_layers)  # before reading the weights
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with mute_load_report():
        result: Any = family.source.from_pretrained(
            name_or_path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, info = result
    loaded = _adapt(model, feature_layer=feature_layer)
    _check_keys(loaded, family, info, source=name_or_path)
    return loaded


def _check_keys(loaded: LoadedEncoder, family: EncoderFamily, info: Mapping[str, Any], *, source: str) -> None:
    """Rejects missing and mismatched keys that are used, and layers that the config does not have."""
    used = {*loaded.module.state_dict(), *family.embedding_keys(patches=True)}
    layers = next(name for name, part in loaded.module.named_modules() if isinstance(part, nn.ModuleList))
    surplus = {key for key in info["unexpected_keys"] if key.startswith(f"{layers}.")}
    missing = {key for key in info["missing_keys"] if key in used}
    mismatched = [row for row in info["mismatched_keys"] if row[0] in used]
    check_loaded_keys(
        {"missing_keys": missing, "unexpected_keys": surplus, "mismatched_keys": mismatched},
        source=source,
        advice="check that its config is the one of its weights",
    )
    dropped = sorted({*info["unexpected_keys"]} - surplus)
    if dropped:
        logger.info("%s: %d tensors outside the vision encoder not read (%s)", source, len(dropped), ", ".join(dropped))


def _from_volume_vit(
    volume: VolumeViT,
    *,
    feature_layer: int | None,
    image_size: Sequence[int] | None,
    patch_size: Sequence[int] | None,
) -> LoadedEncoder:
    patches = volume.patches(image_size=image_size, patch_size=patch_size)
    config = volume.config(patches)
    loaded = _adapt(AutoModel.from_config(config), feature_layer=feature_layer)
    loaded.module.to(patches.weight)
    layers = next(name for name, part in loaded.module.named_modules() if isinstance(part, nn.ModuleList))
    state = volume.hugging_face_state(layers=layers)
    loaded.module.load_state_dict({key: state[key] for key in loaded.module.state_dict()})
    return LoadedEncoder(loaded.module, config, patches, feature_layer)
