"""The `model` section: where the weights come from, the modalities, and which parts are trained."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from umbrella_data.pipeline.patch_grid import patch_grid
from umbrella_train.config.section import ModalityName, Section, UniqueNames, errors_at
from umbrella_train.config.strict_yaml import SECRET_ADVICE, secret_keys

PartState = Literal["train", "frozen", "lora"]
Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]
# Endings of files with the weights of MONAI's ViT, as in umbrella_model; a test compares the two.
STATE_DICT_FILES = (".safetensors", ".pt", ".pth", ".ckpt")
# transformers would look for a folder named "~".
Source = Annotated[str, AfterValidator(lambda name: str(Path(name).expanduser()) if name.startswith("~") else name)]


class ModalityModelConfig(Section):
    """The grid that one modality's patch embed works on."""

    image_size: Sizes
    """Voxels along X, Y, Z, and frames along T for a series."""
    patch_size: Sizes
    """Voxels of one patch along the same axes; it must divide image_size."""

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        """Vision tokens of one scan."""
        return math.prod(self.grid_size)


class LoraConfig(Section):
    """The adapters on every linear layer of the parts that are lora."""

    rank: PositiveInt = 16
    """Rank of the adapters' product."""
    alpha: PositiveInt = 32
    """Scale of the adapters' output, divided by the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the adapters."""


class PartLearningRates(Section):
    """Peak learning rates of single parts, in place of trainer.learning_rate."""

    patch_embed: PositiveFloat | None = None
    """Of the patch embeds."""
    vision_tower: PositiveFloat | None = None
    """Of the vision encoder."""
    projector: PositiveFloat | None = None
    """Of the projector."""
    language_model: PositiveFloat | None = None
    """Of the language model."""
    embeddings: PositiveFloat | None = None
    """Of the token embeddings and the head."""

    @property
    def given(self) -> dict[str, float]:
        """The rates of the parts that have their own."""
        return {part: rate for part, rate in self if rate is not None}


# Parts and presets are those of umbrella_model, whose import would load torch; a test compares the two.
PARTS = tuple(PartLearningRates.model_fields)
PRESETS: Mapping[str, Mapping[str, PartState]] = {
    "full": dict.fromkeys(PARTS, "train"),
    "align": {"patch_embed": "train", "projector": "train"},
    "patch_embed_only": {"patch_embed": "train"},
    "lora": {"patch_embed": "train", "projector": "train", "language_model": "lora"},
}


class LearnConfig(Section):
    """Which parts of the model learn, and how fast: a preset, and single parts that differ from it."""

    preset: Literal["full", "align", "patch_embed_only", "lora"] = "full"
    """full: everything; align: patch embeds and projector; patch_embed_only; lora: align and adapters."""
    patch_embed: PartState | None = None
    """The patch embeds of all modalities."""
    vision_tower: PartState | None = None
    """The vision encoder behind the patch embeds."""
    projector: PartState | None = None
    """The projector from vision features to the language model."""
    language_model: PartState | None = None
    """The language model without its token embeddings."""
    embeddings: PartState | None = None
    """The token embeddings and the output head."""
    learning_rates: PartLearningRates = PartLearningRates()
    """Learning rates of single parts."""
    lora: LoraConfig = LoraConfig()
    """The adapters of parts that are lora."""

    @field_validator("learning_rates")
    @classmethod
    def _check_rates_are_used(cls, rates: PartLearningRates, info: ValidationInfo) -> PartLearningRates:
        if {"preset", *PARTS} <= info.data.keys():
            states = _part_states(info.data)
            unused = [part for part in rates.given if states[part] == "frozen"]
            if unused:
                raise errors_at([(part, f"would not be used: {part} is frozen") for part in unused])
        return rates

    @property
    def parts(self) -> dict[str, PartState]:
        """Every part with its state, the preset resolved."""
        return _part_states(dict(self))


def _part_states(learn: Mapping[str, Any]) -> dict[str, PartState]:
    preset = PRESETS[learn["preset"]]
    return {part: learn[part] or preset.get(part, "frozen") for part in PARTS}


class ModelConfig(Section):
    """The model: a LLaVA or an earlier run's model (pretrained), or a language model and a vision encoder.

    Each of the two is pretrained (language_model, vision_encoder) or has random weights (text_config, vision_config).
    """

    pretrained: Source | None = None
    """A LLaVA checkpoint, or the model of an earlier run (RUN/model): a folder, or a name on the hub.

    Every name on the hub may have a branch, tag or commit: owner/name@revision."""
    language_model: Source | None = None
    """A pretrained decoder of AutoModelForCausalLM: a folder, a name on the hub, or a GGUF file."""
    vision_encoder: Source | None = None
    """SigLIP, CLIP, DINOv2, ViT, ViT-MAE: a folder, or a name on the hub; or a file with the weights of MONAI's ViT."""
    tokenizer: Source | None = None
    """A tokenizer: a folder, or a name on the hub. Without one: that of the model, or else a byte-level one."""
    template_date: datetime.date | None = None
    """The date for a chat template that writes today's, as in 2025-01-31: training and questions need the same one."""
    vision_config: dict[str, Any] | None = None
    """Hugging Face config of the vision encoder, with its model_type, for random weights."""
    text_config: dict[str, Any] | None = None
    """Hugging Face config of the language model, with its model_type, for random weights."""
    vision_num_heads: PositiveInt | None = None
    """Attention heads of a vision_encoder that is a file, which does not say it."""
    vision_image_size: tuple[PositiveInt, ...] | None = None
    """Voxels along each axis that a vision_encoder in a file was trained on; needed if its grid is not cubic."""
    vision_patch_size: tuple[PositiveInt, ...] | None = None
    """Voxels of its patches; needed if they are not cubes and the file has a perceptron patch embedding."""
    vision_feature_layer: int | None = None
    """The encoder layer whose output goes to the projector, as in LlavaConfig.

    Default: that of the LLaVA; with language_model or vision_encoder, the output after the final norm; otherwise -1."""
    projector: Literal["mlp", "linear"] | None = None
    """The projector: two layers (mlp, the default), or one; pretrained brings its own."""
    init: Literal["inflate", "random"] = "inflate"
    """Initial patch embeds: inflate the filter and positions of a pretrained vision encoder, or random."""
    attn_implementation: Literal["varlen", "sdpa", "eager"] | None = None
    """Attention: varlen trains without a padding mask. Default: varlen, but sdpa with a sliding window."""
    modalities: Annotated[dict[ModalityName, ModalityModelConfig], Field(min_length=1), UniqueNames]
    """The modalities by name (T1, rsfMRI, dMRI); their order here is the order of the modality tags."""
    pool: Annotated[dict[ModalityName, PositiveInt | Sizes], UniqueNames] = Field(default_factory=dict)
    """Neighbouring patches along each axis that are averaged to one token, by modality: 1, or as [2, 2, 2, 1]."""
    learn: LearnConfig = LearnConfig()
    """Which parts learn."""

    @field_validator("language_model", "vision_encoder", "projector")
    @classmethod
    def _check_is_not_pretrained(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("pretrained") is not None:
            raise ValueError("would not be used: the checkpoint named by pretrained brings its own")
        return value

    @field_validator("vision_config", "text_config")
    @classmethod
    def _check_source(cls, config: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if config is not None and (secrets := secret_keys(config)):
            raise errors_at([(path, SECRET_ADVICE) for path in secrets])
        other = {"text_config": "language_model", "vision_config": "vision_encoder"}[str(info.field_name)]
        given = [name for name in ("pretrained", other) if info.data.get(name) is not None]
        if given and config is not None:
            raise ValueError(f"would not be used: what {given[0]} names brings its own")
        if config is None and not given and {"pretrained", other} <= info.data.keys():
            raise ValueError(f"is required without {other} and without pretrained")
        if config is not None and "model_type" not in config:
            raise errors_at([("model_type", "is missing: it selects the Hugging Face config class")])
        return config

    @field_validator("vision_num_heads")
    @classmethod
    def _check_heads_are_used(cls, number: int | None, info: ValidationInfo) -> int | None:
        if "vision_encoder" not in info.data:
            return number
        encoder = info.data["vision_encoder"]
        is_file = encoder is not None and encoder.endswith(STATE_DICT_FILES)
        if number is not None and not is_file:
            reason = "there is no vision_encoder" if encoder is None else f"{encoder} has its own number in its config"
            raise ValueError(f"would not be used: {reason}")
        if number is None and is_file:
            raise ValueError(f"is required: {encoder} has the weights of MONAI's ViT alone, without their number")
        return number

    @field_validator("vision_image_size", "vision_patch_size")
    @classmethod
    def _check_is_for_a_file(cls, size: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        encoder = info.data.get("vision_encoder")
        if size is not None and "vision_encoder" in info.data and not (encoder or "").endswith(STATE_DICT_FILES):
            raise ValueError("would not be used: vision_encoder is not a file with the weights of MONAI's ViT")
        return size

    @field_validator("modalities")
    @classmethod
    def _check_grids(cls, modalities: dict[str, ModalityModelConfig]) -> dict[str, ModalityModelConfig]:
        problems = []
        for name, modality in modalities.items():
            try:
                patch_grid(modality.image_size, modality.patch_size, modality=name)
            except ValueError as error:
                problems.append((name, str(error)))
        if problems:
            raise errors_at(problems)
        return modalities

    @field_validator("pool")
    @classmethod
    def _check_pool(cls, pool: dict[str, int | tuple[int, ...]], info: ValidationInfo) -> Any:
        modalities = info.data.get("modalities", {})
        problems = []
        for name, value in pool.items() if modalities else ():
            if name not in modalities:
                problems.append((name, f"model.modalities has no {name} (it has {', '.join(modalities)})"))
                continue
            grid = modalities[name].grid_size
            sizes = _pool_size(value, len(grid))
            if len(sizes) != len(grid) or any(patches % size for patches, size in zip(grid, sizes, strict=True)):
                problems.append((name, f"{value} does not divide the {grid} patches along the axes of {name}"))
        if problems:
            raise errors_at(problems)
        return pool

    @model_validator(mode="after")
    def _check_positions(self) -> ModelConfig:
        positions = (self.text_config or {}).get("max_position_embeddings")
        problems = [
            ("text_config.max_position_embeddings", f"{positions} is less than the {tokens} tokens of one {name} scan")
            for name, tokens in self._num_tokens()
            if isinstance(positions, int) and tokens > positions
        ]
        if problems:
            raise errors_at(problems)
        return self

    def _num_tokens(self) -> Iterator[tuple[str, int]]:
        """Tokens of one scan of each modality, after pooling."""
        for name, modality in self.modalities.items():
            yield name, modality.num_patches // math.prod(self.pool_size(name))

    def pool_size(self, name: str) -> tuple[int, ...]:
        """Patches along each axis that are averaged to one token of a modality."""
        return _pool_size(self.pool.get(name, 1), len(self.modalities[name].grid_size))

    @property
    def random_and_fixed(self) -> list[str]:
        """Parts that keep their random initial weights: nothing pretrained is loaded, and they are not trained."""
        loaded: set[str] = set(PARTS) if self.pretrained is not None else set()
        if self.language_model is not None:
            loaded |= {"language_model", "embeddings"}
        if self.vision_encoder is not None:
            loaded |= {"vision_tower", "patch_embed"} if self.init == "inflate" else {"vision_tower"}
        states = self.learn.parts
        return [part for part in PARTS if part not in loaded and states[part] != "train"]


def _pool_size(pool: int | tuple[int, ...], num_axes: int) -> tuple[int, ...]:
    return (pool,) * num_axes if isinstance(pool, int) else pool
