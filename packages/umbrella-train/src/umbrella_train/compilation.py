"""torch.compile where it pays and nowhere else: each layer of the encoder and of the language model by itself."""

from __future__ import annotations

import torch
from torch import nn

from umbrella_train.sharding import transformer_layers


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> int:
    """Compiles every transformer layer in place; names in the state dict stay as they are.

    One layer's code serves all layers of its kind. Lengths are symbols from the start: a batch of another length does
    not compile again. What surrounds the layers looks at Python dicts of modalities and stays eager.

    Args:
        model: An UMBRELLA model, before it is wrapped or sharded.
        backend: As in `torch.compile`.

    Returns:
        The number of layers.
    """
    layers = list(transformer_layers(model))
    for layer in layers:
        # Of `forward` and not of the module: hooks of a sharded engine stay outside, where they need not be traced.
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    return len(layers)
