"""Model configuration: a LLaVA configuration with one patch embed configuration per modality."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from transformers import LlavaConfig

AXES = ("X", "Y", "Z", "T")
LLAVA_MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
"""Hugging Face model types with one vision tower and LLaVA's two-layer projector, supported by `from_llava`."""


@dataclass(frozen=True)
class PatchEmbedConfig:
    """How scans of one modality are divided into patches and tokens.

    Attributes:
        image_size: Voxels along (X, Y, Z), or (X, Y, Z, T) for a series of volumes.
        patch_size: Voxels of one patch along the same axes; must divide `image_size`.
        in_channels: Channels of a volume, for example 2 for FA and MD.
        pool: Number of neighbouring patches along each axis that are averaged to one token between encoder and
            projector; a single number applies to all axes. Must divide `grid_size`.

    Raises:
        ValueError: A size is not an integer, or the sizes do not fit together; the message names each axis and the
            nearest valid sizes.
    """

    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    in_channels: int = 1
    pool: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        # JSON and YAML give lists; a hashable dataclass needs tuples.
        object.__setattr__(self, "image_size", _as_integers(self.image_size, name="image_size"))
        object.__setattr__(self, "patch_size", _as_integers(self.patch_size, name="patch_size"))
        object.__setattr__(self, "in_channels", _as_integers((self.in_channels,), name="in_channels")[0])
        pool = self.pool if isinstance(self.pool, Iterable) else (self.pool,) * len(self.image_size)
        object.__setattr__(self, "pool", _as_integers(pool, name="pool"))
        self._check_axes()
        _check_divides(self.image_size, self.patch_size, "patch_size must divide image_size")
        _check_divides(self.grid_size, self.pool_size, "pool must divide the grid of patches")

    def _check_axes(self) -> None:
        if len(self.image_size) not in (3, 4):
            raise ValueError(f"image_size {self.image_size} must have 3 axes (X, Y, Z) or 4 (X, Y, Z, T)")
        for name, sizes in (("patch_size", self.patch_size), ("pool", self.pool_size)):
            if len(sizes) != len(self.image_size):
                raise ValueError(
                    f"{name} {sizes} has {len(sizes)} axes, image_size {self.image_size} has {len(self.image_size)}; "
                    "they must have the same number of axes"
                )
        if min(*self.image_size, *self.patch_size, *self.pool_size, self.in_channels) < 1:
            raise ValueError(f"sizes and channels must be positive, got {self}")

    @property
    def is_series(self) -> bool:
        """Whether the modality has a time axis."""
        return len(self.image_size) == 4

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def pool_size(self) -> tuple[int, ...]:
        """Patches averaged along each axis."""
        assert isinstance(self.pool, tuple)
        return self.pool

    @property
    def num_patches(self) -> int:
        """Patches of one volume: the length of the encoder's sequence."""
        return math.prod(self.grid_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of one volume in the language model, after pooling."""
        return self.num_patches // math.prod(self.pool_size)

    @property
    def patch_elements(self) -> int:
        """Values in one patch, channels included."""
        return self.in_channels * math.prod(self.patch_size)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _as_integers(sizes: Iterable[Any], *, name: str) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ValueError(f"{name} is {sizes!r}; it must be a list of integers, one per axis")
    values = tuple(sizes)
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        # `operator.index` rejects 8.9 and accepts numpy integers.
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must be integers, got {values}") from None


def _check_divides(sizes: tuple[int, ...], parts: tuple[int, ...], rule: str) -> None:
    problems = [
        f"{axis}: {size} is not a multiple of {part} (try {size // part * part or part} or "
        f"{math.ceil(size / part) * part})"
        for axis, size, part in zip(AXES, sizes, parts, strict=False)
        if size % part
    ]
    if problems:
        raise ValueError(f"{rule}: " + "; ".join(problems))


class UmbrellaConfig(LlavaConfig):
    """A LLaVA configuration with a patch embed for each modality.

    Attributes:
        modalities: `PatchEmbedConfig` (or its dict form) of each modality, by name.
        modality_order: The modalities in the order of their tags (tag 0 is text, tag i+1 the i-th modality). Default:
            the order of `modalities`. It is a separate list because a saved config sorts its keys. A modality that is
            added to `modalities` later is appended, so that existing tags do not change.
        projector: `mlp`, LLaVA-1.5's two layers, or `linear`, one.
        vision_final_norm: Whether the features are after the encoder's final norm, as in Hugging Face's
            `last_hidden_state`; LLaVA takes them before it. CLIP has no such norm.
        lora: The adapters that the model is built with, as written by `umbrella_model.lora.add_lora`: `parts`, `rank`,
            `alpha`, `dropout`; or None.

    Raises:
        ValueError: `modality_order` and `modalities` have different names, a name is not a Python identifier, or
            `vision_feature_select_strategy` is not `full` ("default" drops a class token, which volumes do not have).
    """

    model_type = "umbrella"
    # Outputs that Hugging Face's Trainer does not pass to `compute_metrics`; the cache has two names (see `hf_compat`).
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "dummy_terms"]

    # The base class declares dict or None; after construction they are configurations.
    vision_config: Any = None
    text_config: Any = None
    modalities: dict[str, Any] | None = None
    modality_order: list[str] | None = None
    projector: Literal["mlp", "linear"] = "mlp"
    lora: dict[str, Any] | None = None
    vision_feature_layer: int | list[int] = -1
    vision_final_norm: bool = False
    vision_feature_select_strategy: Literal["default", "full"] = "full"

    def __post_init__(self, **kwargs: Any) -> None:
        given: Mapping[str, Any] = self.modalities or {}
        order = list(given) if self.modality_order is None else list(self.modality_order)
        if sorted(order) != sorted(given):
            raise ValueError(f"modality_order {order} must contain each of the modalities {sorted(given)} once")
        if self.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; it must be 'full', since "
                "volumes have no class token to drop"
            )
        self.modality_order = order
        self.sync_modality_order()
        super().__post_init__(**kwargs)

    def sync_modality_order(self) -> None:
        """Makes `modalities` and `modality_order` consistent; Hugging Face may set attributes of a config at any time.

        Raises:
            ValueError: As `patch_embeds`.
        """
        self.modalities = self.patch_embeds
        self.modality_order = list(self.modalities)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Hugging Face's `get_config_dict`, which `from_pretrained` calls to read the config of a checkpoint.

        Raises:
            ValueError: The checkpoint has another `model_type`.
        """
        entries, options = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = entries.get("model_type")
        if model_type != cls.model_type:
            advice = (
                "load it with UmbrellaForConditionalGeneration.from_llava(..., modalities=...)"
                if model_type in LLAVA_MODEL_TYPES
                else "pass a checkpoint written by save_pretrained"
            )
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type!r} checkpoint, not {cls.model_type!r}; {advice}"
            )
        return entries, options

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict."""
        output = super().to_dict()
        output["modalities"] = {name: patch_embed.to_dict() for name, patch_embed in self.patch_embeds.items()}
        output["modality_order"] = list(output["modalities"])
        return output

    @property
    def patch_embeds(self) -> dict[str, PatchEmbedConfig]:
        """The configuration of each modality in the order of the tags; modalities not in `modality_order` come last.

        Raises:
            ValueError: `modality_order` has a modality that is not in `modalities`, or a name is not a Python
                identifier.
        """
        given: Mapping[str, Any] = self.modalities or {}
        old = self.modality_order or []
        removed = [name for name in old if name not in given]
        if removed:
            raise ValueError(
                f"modality_order {old} has {', '.join(removed)}, which is not in modalities {list(given)}; to remove a "
                "modality, which changes the tags of the modalities after it, set modality_order too"
            )
        order = [*old, *(name for name in given if name not in old)]
        for name in order:
            if not name.isidentifier():
                raise ValueError(f"modality {name!r} is used in a module name and must be a Python identifier")
        configs = ((name, given[name]) for name in order)
        return {name: c if isinstance(c, PatchEmbedConfig) else PatchEmbedConfig(**c) for name, c in configs}

    @property
    def vision_depth(self) -> int:
        """Number of encoder layers up to `vision_feature_layer`; later layers are not built.

        As in LLaVA, feature layer 0 is the embeddings and -1 the output of the last layer.
        """
        if not isinstance(self.vision_feature_layer, int):
            raise ValueError(
                f"vision_feature_layer {self.vision_feature_layer}: several feature layers are not supported; set one"
            )
        return feature_depth(self.vision_feature_layer, num_layers=self.vision_config.num_hidden_layers)


def feature_depth(feature_layer: int, *, num_layers: int) -> int:
    """Number of encoder layers up to a feature layer, counted as in LLaVA.

    Raises:
        ValueError: The encoder does not have the layer.
    """
    depth = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 0 <= depth <= num_layers:
        raise ValueError(f"vision_feature_layer {feature_layer} is out of range for an encoder of {num_layers} layers")
    return depth
