"""What an UMBRELLA model is made of: one patch-embed configuration a modality on top of a LLaVA configuration."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from transformers import LlavaConfig

VOLUME_AXES = ("X", "Y", "Z")
SERIES_AXES = ("X", "Y", "Z", "T")
LLAVA_MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
"""Hugging Face model types with one vision tower and LLaVA's two-layer projector; `from_llava` takes these."""


@dataclass(frozen=True)
class PatchEmbedConfig:
    """How the volumes of one modality are cut into tokens.

    Attributes:
        image_size: Voxels along (X, Y, Z), or (X, Y, Z, T) for a series of volumes.
        patch_size: Voxels of one patch along the same axes; it must divide `image_size`.
        in_channels: Channels of a volume, for example 2 for FA and MD.
        pool: How many neighbouring patches along each axis are averaged to one token between encoder and projector; one
            number stands for all axes. It must divide `grid_size`.

    Raises:
        ValueError: A size is not a whole number, or the sizes do not fit together; the message names each axis and the
            nearest sizes that would.
    """

    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    in_channels: int = 1
    pool: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        # Lists arrive from JSON and YAML; a frozen, hashable table wants tuples.
        object.__setattr__(self, "image_size", _as_integers(self.image_size, name="image_size"))
        object.__setattr__(self, "patch_size", _as_integers(self.patch_size, name="patch_size"))
        object.__setattr__(self, "in_channels", _as_integers((self.in_channels,), name="in_channels")[0])
        pool = self.pool if isinstance(self.pool, Iterable) else (self.pool,) * len(self.image_size)
        object.__setattr__(self, "pool", _as_integers(pool, name="pool"))
        self._check_axes()
        _check_divides(
            self.image_size, self.patch_size, "patch_size must divide image_size, or the border would be lost"
        )
        _check_divides(self.grid_size, self.pool_size, "pool must divide the grid of patches")

    def _check_axes(self) -> None:
        if len(self.image_size) not in (len(VOLUME_AXES), len(SERIES_AXES)):
            raise ValueError(f"image_size {self.image_size} must have 3 axes (X, Y, Z) or 4 (X, Y, Z, T)")
        for name, sizes in (("patch_size", self.patch_size), ("pool", self.pool_size)):
            if len(sizes) != len(self.image_size):
                raise ValueError(
                    f"{name} {sizes} has {len(sizes)} axes, image_size {self.image_size} has {len(self.image_size)}; "
                    "they must agree"
                )
        if min(*self.image_size, *self.patch_size, *self.pool_size, self.in_channels) < 1:
            raise ValueError(f"sizes and channels must be positive, got {self}")

    @property
    def is_series(self) -> bool:
        """Whether the modality has a time axis."""
        return len(self.image_size) == len(SERIES_AXES)

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def pool_size(self) -> tuple[int, ...]:
        """Patches merged along each axis."""
        assert isinstance(self.pool, tuple)
        return self.pool

    @property
    def num_patches(self) -> int:
        """Patches of one volume: the length of the encoder's sequence."""
        return math.prod(self.grid_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of one volume in the language model: patches after pooling."""
        return self.num_patches // math.prod(self.pool_size)

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch, channels included."""
        return self.in_channels * math.prod(self.patch_size)

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _as_integers(sizes: Iterable[Any], *, name: str) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ValueError(f"{name} is {sizes!r}; it must be a list of whole numbers, one an axis")
    values = tuple(sizes)
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        # Exact: 8.9 voxels are not 8, and numpy's integers are integers.
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, got {values}") from None


def _check_divides(sizes: tuple[int, ...], parts: tuple[int, ...], rule: str) -> None:
    problems = [
        f"{axis}: {size} is not a multiple of {part} (try {size // part * part or part} or "
        f"{math.ceil(size / part) * part})"
        for axis, size, part in zip(SERIES_AXES, sizes, parts, strict=False)
        if size % part
    ]
    if problems:
        raise ValueError(f"{rule}: " + "; ".join(problems))


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration with a patch embed for each modality.

    Attributes:
        modalities: `PatchEmbedConfig` (or its dict form) of each modality, by name.
        modality_order: The modalities in the order of their tags (tag 0 is text, tag i+1 the i-th modality). Taken from
            the order of `modalities` and kept as a list of its own, because a saved config sorts its keys. A modality
            that is set later gets its place when a model is built: behind the others, whose tags stay.
        lora: The adapters that the model is built with, as `umbrella_model.lora.add_lora` notes them: `parts`, `rank`,
            `alpha`, `dropout`. None for none.

    Raises:
        ValueError: `modality_order` does not name the modalities exactly, a name cannot be part of a module name, or
            `vision_feature_select_strategy` is not `full`: "default" leaves a class token out, and volumes have none.
            Later, when modalities are read: `modality_order` names one that is no longer there.
    """

    model_type = "umbrella"
    # Of an output, what Hugging Face's Trainer keeps from `compute_metrics`: the cache by its old and its new name too.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "dummy_terms"]

    # Declared as dicts or None by the base class; once built they are configurations.
    vision_config: Any = None
    text_config: Any = None
    modalities: dict[str, Any] | None = None
    modality_order: list[str] | None = None
    lora: dict[str, Any] | None = None
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"

    def __post_init__(self, **kwargs: Any) -> None:
        given: Mapping[str, Any] = self.modalities or {}
        order = list(given) if self.modality_order is None else list(self.modality_order)
        if sorted(order) != sorted(given):
            raise ValueError(f"modality_order {order} must name each of the modalities {sorted(given)} once")
        if self.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; it must be 'full': there "
                "is no class token among the patches of a volume that could be left out"
            )
        self.modality_order = order
        self.settle_modalities()
        super().__post_init__(**kwargs)

    def settle_modalities(self) -> None:
        """Brings `modalities` and `modality_order` in line: Hugging Face sets attributes of a config at any time.

        Raises:
            ValueError: As `patch_embeds`.
        """
        self.modalities = self.patch_embeds
        self.modality_order = list(self.modalities)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Hugging Face's `get_config_dict`, by which `from_pretrained` reads the config of a checkpoint.

        Raises:
            ValueError: The checkpoint is one of another kind.
        """
        entries, options = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = entries.get("model_type")
        if model_type != cls.model_type:
            right = (
                "UmbrellaForConditionalGeneration.from_llava(..., modalities=...) starts from it"
                if model_type in LLAVA_MODEL_TYPES
                else "it must be one that save_pretrained wrote"
            )
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type!r} checkpoint and not an {cls.model_type!r} one: "
                + right
            )
        return entries, options

    def to_dict(self) -> dict[str, Any]:
        """A plain form for JSON."""
        output = super().to_dict()
        output["modalities"] = {name: patch_embed.to_dict() for name, patch_embed in self.patch_embeds.items()}
        output["modality_order"] = list(output["modalities"])
        return output

    @property
    def patch_embeds(self) -> dict[str, PatchEmbedConfig]:
        """The patch embed of each modality, in the order of the tags: new modalities come behind `modality_order`.

        Raises:
            ValueError: `modality_order` names a modality that is not there, whose tag another would get, or a name
                cannot be part of a module name.
        """
        given: Mapping[str, Any] = self.modalities or {}
        old = self.modality_order or []
        gone = [name for name in old if name not in given]
        if gone:
            raise ValueError(
                f"modality_order {old} names {', '.join(gone)}, which modalities {list(given)} has not; to take a "
                "modality out, which gives those behind it other tags, set modality_order too"
            )
        order = [*old, *(name for name in given if name not in old)]
        for name in order:
            if not name.isidentifier():
                raise ValueError(f"modality {name!r} becomes part of a module name and must be a Python identifier")
        return {name: _as_patch_embed_config(given[name]) for name in order}

    @property
    def vision_depth(self) -> int:
        """Encoder layers that `vision_feature_layer` reaches; the layers behind it are never built.

        Counts as LLaVA does: feature layer 0 is the embeddings, -1 the output of the last layer.
        """
        layers: int = self.vision_config.num_hidden_layers
        if not isinstance(self.vision_feature_layer, int):
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer}: several feature layers are not supported; name one"
            )
        depth = self.vision_feature_layer if self.vision_feature_layer >= 0 else layers + 1 + self.vision_feature_layer
        if not 0 <= depth <= layers:
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer} is outside an encoder of {layers} layers"
            )
        return depth


def _as_patch_embed_config(value: PatchEmbedConfig | Mapping[str, Any]) -> PatchEmbedConfig:
    return value if isinstance(value, PatchEmbedConfig) else PatchEmbedConfig(**value)
