"""The `model` section: where the weights come from, the modalities, and which parts learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from umbrella_data.modality import find_modality
from umbrella_train.config.section import Section, SectionError

AXES = ("X", "Y", "Z", "T")
T = TypeVar("T")

PartState = Literal["train", "frozen", "lora"]
Pool = PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]
# transformers would look for a folder named "~".
Source = Annotated[str, AfterValidator(lambda name: str(Path(name).expanduser()) if name.startswith("~") else name)]
Grid = Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]

# The parts that each preset does not freeze; the same as of umbrella_model, which this file must not import.
PARTS = ("patch_embed", "vision_tower", "projector", "language_model", "embeddings")
PRESETS: Mapping[str, Mapping[str, PartState]] = {
    "full": dict.fromkeys(PARTS, "train"),
    "align": {"patch_embed": "train", "projector": "train"},
    "patch_embed_only": {"patch_embed": "train"},
    "lora": {"patch_embed": "train", "projector": "train", "language_model": "lora"},
}


class ModalityModelConfig(Section):
    """The grid that one modality's patch embed works on."""

    image_size: Grid
    """Voxels along X, Y, Z, and frames along T for a series."""
    patch_size: Grid
    """Voxels of one patch along the same axes; it must divide image_size."""

    @model_validator(mode="after")
    def _check_grid(self) -> ModalityModelConfig:
        problems = grid_problems(self.image_size, patch_size=self.patch_size)
        if problems:
            raise SectionError(problems)
        return self

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def num_patches(self) -> int:
        """Vision tokens of one scan."""
        return math.prod(self.grid_size)


def grid_problems(image_size: tuple[int, ...], *, patch_size: tuple[int, ...]) -> list[tuple[str, str]]:
    """Say what keeps a patch from dividing an image.

    Args:
        image_size: Voxels along X, Y, Z (and frames along T).
        patch_size: Voxels of one patch along the same axes.

    Returns:
        Pairs of the key at fault and the problem, with the nearest sizes that would do.
    """
    if len(image_size) != len(patch_size):
        return [("patch_size", f"has {len(patch_size)} numbers where image_size has {len(image_size)}")]
    problems = []
    for axis, size, patch in zip(AXES, image_size, patch_size, strict=False):
        if size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            nearest = f"{below} or {above}" if below else str(above)
            problems.append(("image_size", f"{size} along {axis} is not divisible by the patch of {patch}: {nearest}"))
    return problems


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
        """The rates of the parts that have one of their own."""
        rates: dict[str, float | None] = {part: getattr(self, part) for part in PARTS}
        return {part: rate for part, rate in rates.items() if rate is not None}


class LearnConfig(Section):
    """Which parts of the model learn, and how fast: a preset, and single parts that depart from it."""

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

    @model_validator(mode="after")
    def _check_rates_are_used(self) -> LearnConfig:
        problems = [
            (f"learning_rates.{part}", f"would not be used: {part} is frozen")
            for part in self.learning_rates.given
            if self.parts[part] == "frozen"
        ]
        if problems:
            raise SectionError(problems)
        return self

    @property
    def parts(self) -> dict[str, PartState]:
        """Every part with its state, the preset resolved."""
        explicit: dict[str, PartState | None] = {part: getattr(self, part) for part in PARTS}
        return {part: state or PRESETS[self.preset].get(part, "frozen") for part, state in explicit.items()}


class ModelConfig(Section):
    """The model: a LLaVA checkpoint, an earlier run's model, or a vision and a text config for random weights."""

    pretrained: Source | None = None
    """A LLaVA checkpoint, or the model of an earlier run (RUN/model): a folder, or a name on the hub."""
    tokenizer: Source | None = None
    """A tokenizer: a folder, or a name on the hub. Without one: the checkpoint's own, or else a byte-level one."""
    vision_config: dict[str, Any] | None = None
    """Hugging Face config of the vision encoder, with its model_type, for random weights."""
    text_config: dict[str, Any] | None = None
    """Hugging Face config of the language model, with its model_type, for random weights."""
    vision_feature_layer: int | None = None
    """The encoder layer whose output goes to the projector, as in LlavaConfig (default: the checkpoint's, or -1)."""
    init: Literal["inflate", "random"] = "inflate"
    """Where patch embeds start with pretrained: from the checkpoint's 2-D filter and positions, or from nothing."""
    attn_implementation: Literal["varlen", "sdpa", "eager"] | None = None
    """Attention: varlen trains without a padding mask. Default: varlen, but sdpa with a sliding window."""
    modalities: Annotated[dict[str, ModalityModelConfig], Field(min_length=1)]
    """The modalities by name (T1, rsfMRI, dMRI); their order here is the order of the modality tags."""
    pool: dict[str, Pool] = Field(default_factory=dict)
    """Neighbouring patches along each axis that are averaged to one token, by modality: 1, or as [2, 2, 2, 1]."""
    learn: LearnConfig = LearnConfig()
    """Which parts learn."""

    @field_validator("modalities", mode="after")
    @classmethod
    def _check_modalities(cls, modalities: dict[str, ModalityModelConfig]) -> dict[str, ModalityModelConfig]:
        named = by_canonical_name(modalities)
        problems = []
        for name, modality in named.items():
            rank, given = find_modality(name).spatial_rank, len(modality.image_size)
            if rank != given:
                axes = ", ".join(AXES[:rank])
                problems.append((f"{name}.image_size", f"has {given} numbers where {name} has {rank} axes ({axes})"))
        if problems:
            raise SectionError(problems)
        return named

    @field_validator("pool", mode="after")
    @classmethod
    def _name_pools(cls, pool: dict[str, Pool]) -> dict[str, Pool]:
        return by_canonical_name(pool)

    @model_validator(mode="after")
    def _check_pool(self) -> ModelConfig:
        problems = [problem for name, pool in self.pool.items() for problem in self._pool_problems(name, pool)]
        if problems:
            raise SectionError(problems)
        return self

    def _pool_problems(self, name: str, pool: Pool) -> list[tuple[str, str]]:
        if name not in self.modalities:
            return [(f"pool.{name}", f"modalities has no {name} (it has {', '.join(self.modalities)})")]
        grid = self.modalities[name].grid_size
        sizes = (pool,) * len(grid) if isinstance(pool, int) else pool
        if len(sizes) != len(grid):
            return [(f"pool.{name}", f"has {len(sizes)} numbers where {name} has {len(grid)} axes")]
        return [
            (f"pool.{name}", f"{size} along {axis} does not divide the {patches} patches there")
            for axis, patches, size in zip(AXES, grid, sizes, strict=False)
            if patches % size
        ]

    @model_validator(mode="after")
    def _check_positions(self) -> ModelConfig:
        positions = (self.text_config or {}).get("max_position_embeddings")
        if not isinstance(positions, int):
            return self
        problems = [
            ("text_config.max_position_embeddings", f"{positions} is less than the {tokens} tokens of one {name} scan")
            for name, tokens in self._num_tokens().items()
            if tokens > positions
        ]
        if problems:
            raise SectionError(problems)
        return self

    @property
    def random_and_fixed(self) -> list[str]:
        """Parts that stay as random as they start: nothing pretrained is loaded, and their weights are not trained."""
        states = self.learn.parts
        return [] if self.pretrained is not None else [part for part in PARTS if states[part] != "train"]

    def _num_tokens(self) -> dict[str, int]:
        """Tokens of one scan, after pooling."""
        pools = {name: self.pool.get(name, 1) for name in self.modalities}
        return {
            name: modality.num_patches
            // (pool ** len(modality.grid_size) if isinstance(pool := pools[name], int) else math.prod(pool))
            for name, modality in self.modalities.items()
        }

    @model_validator(mode="after")
    def _check_source(self) -> ModelConfig:
        configs = {"vision_config": self.vision_config, "text_config": self.text_config}
        if self.pretrained is not None:
            problems = [
                (name, "would not be used: the checkpoint named by pretrained brings its own")
                for name, config in configs.items()
                if config is not None
            ]
        else:
            problems = [(name, "is needed where no pretrained is named") for name, c in configs.items() if c is None]
            problems += [
                (f"{name}.model_type", "is missing: it says which Hugging Face config this is")
                for name, config in configs.items()
                if config is not None and "model_type" not in config
            ]
        if problems:
            raise SectionError(problems)
        return self


def by_canonical_name(entries: Mapping[str, T]) -> dict[str, T]:
    """Rename the keys of a table of modalities to their canonical names, in the same order.

    Raises:
        SectionError: For unknown names, and for two names of one modality.
    """
    named: dict[str, T] = {}
    problems = []
    for name, entry in entries.items():
        try:
            canonical = find_modality(name).name
        except ValueError as error:
            problems.append((name, str(error)))
            continue
        if canonical in named:
            problems.append((name, f"is another name of {canonical}, which is here already"))
        named[canonical] = entry
    if problems:
        raise SectionError(problems)
    return named
