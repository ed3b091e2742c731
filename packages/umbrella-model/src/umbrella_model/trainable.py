"""Which parts of a model learn, and a table of it."""

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
    """One row of the table of parameters: elements in all, and those that learn."""

    part: str
    num_parameters: int
    num_trainable: int


def set_trainable(
    model: PreTrainedModel, parts: Mapping[Part, Mode] | str, *, lora: LoraSettings | None = None
) -> None:
    """Freezes and unfreezes parts of a model, and puts adapters on those that are `lora`.

    Args:
        model: The model.
        parts: A preset (`full`, `align`, `patch_embed_only`, `lora`), or a mode for every part that is to change.
        lora: The adapters of parts that are `lora`; None for those that are there, or else the defaults.

    Raises:
        ValueError: No preset and no mapping, an unknown preset, part or mode, or adapters that do not fit those that
            are there.
        ImportError: A part is `lora` and peft is not installed.
    """
    if isinstance(parts, str):
        if parts not in PRESETS:
            raise ValueError(f"unknown preset {parts!r}; known are {', '.join(PRESETS)}")
        parts = PRESETS[parts]
    if not isinstance(parts, Mapping):
        raise ValueError(
            f"parts is {parts!r}; it must be a preset ({', '.join(PRESETS)}) or a mode for each part, such as "
            "{'projector': 'train'}"
        )
    _check_parts(parts)
    wrong = {part: mode for part, mode in parts.items() if mode not in get_args(Mode)}
    if wrong:
        raise ValueError(f"a part is 'train', 'frozen' or 'lora', got {wrong}")
    adapted = [part for part in PARTS if parts.get(part) == "lora"]
    if adapted:
        add_lora(model, adapted, lora)
    for part, name, parameter in named_part_parameters(model):
        mode = parts.get(part)
        if mode == "train" and is_lora_name(name):
            raise ValueError(f"{part} has adapters, which 'train' would leave beside it: merge_lora first")
        if mode is not None:
            parameter.requires_grad_(mode == "train" or (mode == "lora" and is_lora_name(name)))


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    part_learning_rates: Mapping[Part, float] | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimiser of torch.

    Args:
        model: The model.
        learning_rate: Of parts that `part_learning_rates` does not name; their groups come first.
        part_learning_rates: Learning rates of single parts.
        weight_decay: Of matrices and tables; biases and norms, which are vectors, have none.

    Returns:
        Dicts of `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: `part_learning_rates` names an unknown part.
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
        raise ValueError(f"unknown part {', '.join(unknown)}; known are {', '.join(PARTS)}")


def parameter_table(model: PreTrainedModel) -> list[PartRow]:
    """Parameters and trainable parameters of each part; patch embeds are listed one by one."""
    totals: dict[str, list[int]] = {}
    for part, name, parameter in named_part_parameters(model):
        row = name.split(".proj.")[0].split(".position_embedding")[0].split(".")[-1] if part == "patch_embed" else part
        counts = totals.setdefault(row, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return [PartRow(row, total, trainable) for row, (total, trainable) in totals.items()]
