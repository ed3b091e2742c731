"""Which parts of a model learn, and a table of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from umbrella_model.modeling import UmbrellaForConditionalGeneration

Part = Literal["patch_embed", "vision_tower", "projector", "language_model", "embeddings"]
Mode = Literal["train", "frozen"]
PARTS: tuple[Part, ...] = ("patch_embed", "vision_tower", "projector", "language_model", "embeddings")

PRESETS: Mapping[str, Mapping[Part, Mode]] = {
    "full": dict.fromkeys(PARTS, "train"),
    "align": {**dict.fromkeys(PARTS, "frozen"), "patch_embed": "train", "projector": "train"},
    "patch_embed_only": {**dict.fromkeys(PARTS, "frozen"), "patch_embed": "train"},
}


@dataclass(frozen=True)
class PartRow:
    """One row of the table of parameters: elements in all, and those that learn."""

    part: str
    num_parameters: int
    num_trainable: int


def named_part_parameters(model: UmbrellaForConditionalGeneration) -> Iterator[tuple[Part, str, nn.Parameter]]:
    """Every parameter once, with the part that it belongs to.

    A language model's input and output embeddings are the part `embeddings`; tied ones appear once.
    """
    embeddings = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            yield "embeddings", name, parameter
        elif "_patch_embed." in name:
            yield "patch_embed", name, parameter
        elif ".vision_tower." in name:
            yield "vision_tower", name, parameter
        elif ".multi_modal_projector." in name:
            yield "projector", name, parameter
        else:
            yield "language_model", name, parameter


def set_trainable(model: UmbrellaForConditionalGeneration, parts: Mapping[Part, Mode] | str) -> None:
    """Freezes and unfreezes parts of a model.

    Args:
        model: The model.
        parts: A preset (`full`, `align`, `patch_embed_only`), or a mode for every part that is to change.

    Raises:
        ValueError: An unknown preset, part or mode.
    """
    if isinstance(parts, str):
        if parts not in PRESETS:
            raise ValueError(f"unknown preset {parts!r}; known are {', '.join(PRESETS)}")
        parts = PRESETS[parts]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; known are {', '.join(PARTS)}")
    wrong = {part: mode for part, mode in parts.items() if mode not in ("train", "frozen")}
    if wrong:
        raise ValueError(f"a part is either 'train' or 'frozen', got {wrong}")
    for part, _, parameter in named_part_parameters(model):
        if part in parts:
            parameter.requires_grad_(parts[part] == "train")


def parameter_table(model: UmbrellaForConditionalGeneration) -> list[PartRow]:
    """Parameters and trainable parameters of each part; patch embeds are listed one by one."""
    totals: dict[str, list[int]] = {}
    for part, name, parameter in named_part_parameters(model):
        row = name.split(".proj.")[0].split(".position_embedding")[0].split(".")[-1] if part == "patch_embed" else part
        counts = totals.setdefault(row, [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return [PartRow(row, total, trainable) for row, (total, trainable) in totals.items()]
