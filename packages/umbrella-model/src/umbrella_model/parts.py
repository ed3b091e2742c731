"""The five parts of a model, and the parameters and layers of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = Literal["patch_embed", "vision_tower", "projector", "language_model", "embeddings"]
PARTS: tuple[Part, ...] = ("patch_embed", "vision_tower", "projector", "language_model", "embeddings")


def named_part_parameters(model: PreTrainedModel) -> Iterator[tuple[Part, str, nn.Parameter]]:
    """Yields every parameter once as (part, name, parameter).

    The language model's input and output embeddings are the part `embeddings`; tied ones appear once.
    """
    embeddings = {id(parameter) for module in _embeddings(model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        yield "embeddings" if id(parameter) in embeddings else _part_of(name), name, parameter


def part_layers(model: PreTrainedModel, part: Part) -> list[str]:
    """Names of the linear layers of a part; for `embeddings`, of the input and output embeddings.

    Tables of positions (GPT-2, OPT) are no linear layers, although they are embeddings in torch; nor are routers
    derived from nn.Linear, which return several tensors (Phi-3.5-MoE). Falcon's layers are, although they override
    forward.
    """
    embeddings = {id(module) for module in _embeddings(model)}
    if part == "embeddings":
        return [name for name, module in model.named_modules() if id(module) in embeddings]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not type(module).__name__.endswith("Router")
        and id(module) not in embeddings
        and _part_of(name) == part
    ]


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _part_of(name: str) -> Part:
    if "_patch_embed." in name:
        return "patch_embed"
    if ".vision_tower." in name:
        return "vision_tower"
    return "projector" if ".multi_modal_projector." in name else "language_model"
