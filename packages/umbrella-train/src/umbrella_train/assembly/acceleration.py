"""Attention implementation and compilation of a model's transformer layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_model.attention import VARLEN
from umbrella_model.hf_compat import attention_of
from umbrella_train.distributed.fsdp2 import transformer_layers
from umbrella_train.errors import RunError


def set_attention(model: UmbrellaForConditionalGeneration, wanted: str | None) -> None:
    """Sets the attention of the encoder and of the language model, before the model is wrapped.

    `wanted` is `model.attn_implementation`; None takes `varlen` if it computes what `sdpa` does, and otherwise keeps
    the attention of the model.

    Raises:
        RunError: `varlen` is requested for a language model that needs a mask.
    """
    is_plain = _is_plain_causal(model.config.text_config)
    if wanted is None:
        if not is_plain or attention_of(model.model.language_model.config) != "sdpa":
            return
        wanted = VARLEN
    if wanted == VARLEN and not is_plain:
        raise RunError(
            f"model.attn_implementation: {VARLEN} is causal attention over the whole row, which this language model "
            "does not have in all layers (a sliding window, or another kind of layer); use sdpa"
        )
    model.set_attn_implementation(wanted)


def _is_plain_causal(config: PretrainedConfig) -> bool:
    """Whether every layer attends to all earlier positions, so that rows padded on the right need no mask."""
    kinds: Any = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is None and set(kinds) <= {"full_attention"}


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles every transformer layer in place, before the model is wrapped; names in the state dict do not change.

    Layers of one kind share their code. Lengths are symbolic from the start: a batch of another length does not compile
    again. Code around the layers uses Python dicts of modalities and stays eager.
    """
    for layer in transformer_layers(model):
        # `forward` rather than the module: hooks of a sharded engine stay outside and are not traced.
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
