"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on whole parts of a model, using peft's layers."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from umbrella_model.parts import PARTS, Part, named_part_parameters, part_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the adapters: every linear layer computes x W' + (alpha / rank) x A' B', with B initially zero.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Scale of the adapters' output, divided by the rank.
        dropout: Dropout applied before A.

    Raises:
        ValueError: `rank` or `alpha` is not positive, or `dropout` is outside [0, 1).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank and alpha must be positive and dropout in [0, 1), got {self}")


def add_lora(model: PreTrainedModel, parts: Collection[Part], settings: LoraSettings | None) -> None:
    """Adds adapters to parts of a model, in place; the other parameters of these parts are frozen.

    The settings are stored in `model.config.lora`, so that a saved checkpoint is built with the same adapters.

    Args:
        model: The model.
        parts: The parts to adapt.
        settings: None keeps existing adapters, and uses the defaults if there are none.

    Raises:
        ImportError: peft is not installed.
        ValueError: The model already has other adapters, or a part cannot have adapters.
    """
    ordered = [part for part in PARTS if part in parts]
    if has_lora(model):
        current: dict[str, Any] = model.config.lora or {}
        wanted = current | {"parts": ordered} | ({} if settings is None else asdict(settings))
        is_same = set(ordered) <= set(current.get("parts", ())) if settings is None else current == wanted
        if not is_same:
            raise ValueError(f"the model has adapters {current}, which differ from {wanted}; call merge_lora first")
        return
    settings = settings or LoraSettings()
    if "embeddings" in parts and model.config.tie_word_embeddings:
        raise ValueError(
            "embeddings: 'lora' is not supported for a head that is tied to the input embeddings; use 'train' or "
            "'frozen'"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft; install it with: pip install peft") from error
    layers = [layer for part in parts for layer in part_layers(model, part)]
    # peft freezes everything except its adapters; other parts keep their state.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sets it for GPT-2's layers, as it must be
        inject_adapter_in_model(config, model)
    for parameter in trainable:
        parameter.requires_grad_(True)
    model.config.lora = {"parts": ordered, **asdict(settings)}
    freeze_base_weights(model)


def freeze_base_weights(model: PreTrainedModel) -> None:
    """Freezes all parameters except the adapters in the parts that have adapters."""
    adapted = () if model.config.lora is None else model.config.lora["parts"]
    for part, name, parameter in named_part_parameters(model):
        if part in adapted and not is_lora_name(name):
            parameter.requires_grad_(False)


def merge_lora(model: PreTrainedModel) -> None:
    """Merges the adapters into the weights and removes them, in place.

    The model then saves and loads without peft. Weights that were frozen stay frozen.
    """
    for name, layer in _lora_layers(model):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.config.lora = None
    if hasattr(model, "peft_config"):
        del model.peft_config


def has_lora(model: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return bool(_lora_layers(model))


def is_lora_name(parameter_name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in parameter_name


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    # Found by attribute, so that peft need not be installed.
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
