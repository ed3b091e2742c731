"""Trainable and frozen parts of a model, their parameter groups, and a table of parameter counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from umbrella_model.lora import LoraSettings, add_lora, is_lora_name
from umbrella_model.parts import PARTS, Part, named_part_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["train", "frozen", "lora"]

PRESETS: Mapping[str, Mapping[Part, Mode]] = {
    "full": dict.fromkeys(PARTS, "train"),
    "align": {**dict.fromkeys(PARTS, "frozen"), "patch_embed": "train", "projector": "train"},
    "patch_embed_only": {**dict.fromkeys(PARTS, "frozen"), "patch_embed": "train"},
    "lora": {
        **dict.fromkeys(PARTS, "frozen"), "patch_embed": "train", "projector": "train", "language_model": "lora",
    },
}  # fmt: skip


@dataclass(frozen=True)
class PartRow:
    """One row of `parameter_table`: total and trainable elements of a part."""

    part: str
    num_parameters: int
    num_trainable: int


def set_trainable(
    model: PreTrainedModel, parts: Mapping[Part, Mode] | str, *, lora: LoraSettings | None = None
) -> None:
    """Freezes or unfreezes parts of a model, and adds adapters to parts with mode `lora`.

    Args:
        model: The model.
        parts: A preset (`full`, `align`, `patch_embed_only`, `lora`), or a mode by part; other parts do not change.
        lora: Settings of the adapters; None keeps existing adapters, and uses the defaults if there are none.

    Raises:
        ValueError: `parts` is neither a preset nor a mapping, a preset, part or mode is unknown, or the model has other
            adapters.
        ImportError: A part is `lora` and peft is not installed.
    """
    if isinstance(parts, str):
        if parts not in PRESETS:
            raise ValueError(f"unknown preset {parts!r}; use one of {', '.join(PRESETS)}")
        parts = PRESETS[parts]
    if not isinstance(parts, Mapping):
        raise ValueError(
            f"parts is {parts!r}; it must be a preset ({', '.join(PRESETS)}) or a dict of modes by part, such as "
            "{'projector': 'train'}"
        )
    _check_parts(parts)
    wrong = {part: mode for part, mode in parts.items() if mode not in get_args(Mode)}
    if wrong:
        raise ValueError(f"the mode of a part must be 'train', 'frozen' or 'lora', got {wrong}")
    adapted = [part for part in PARTS if parts.get(part) == "lora"]
    if adapted:
        add_lora(model, adapted, lora)
    for part, name, parameter in named_part_parameters(model):
        mode = parts.get(part)
        if mode == "train" and is_lora_name(name):
            raise ValueError(f"{part} has LoRA adapters and cannot be set to 'train'; call merge_lora first")
        if mode is not None:
            parameter.requires_grad_(mode == "train" or (mode == "lora" and is_lora_name(name)))


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    part_learning_rates: Mapping[Part, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters for a torch optimiser.

    Args:
        model: The model.
        learning_rate: Learning rate of parts that are not in `part_learning_rates`; their groups come first.
        part_learning_rates: Learning rates by part.
        weight_decay: Weight decay of matrices; biases and norms have none.

    Returns:
        Dicts of `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: `part_learning_rates` has an unknown part.
    """
    rates = part_learning_rates or {}
    _check_parts(rates)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for part, _, parameter in named_part_parameters(model):
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((part in rates, rates.get(part, learning_rate), decay), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [{"params": params, "lr": rate, "weight_decay": decay} for (_, rate, decay), params in ordered]


def _check_parts(parts: Mapping[Part, object]) -> None:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")


def parameter_table(model: PreTrainedModel) -> list[PartRow]:
    """Total and trainable elements of each part, with one row per patch embed."""
    totals: dict[str, list[int]] = {}
    for part, name, parameter in named_part_parameters(model):
        row = name.split(".proj.")[0].split(".position_embedding")[0].split(".")[-1] if part == "patch_embed" else part
        counts = totals.setdefault(row, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return [PartRow(row, total, trainable) for row, (total, trainable) in totals.items()]
