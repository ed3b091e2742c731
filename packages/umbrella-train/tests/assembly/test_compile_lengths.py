"""`trainer.torch_compile`: layers are compiled at the first length, and not again at others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from umbrella_train.assembly.acceleration import compile_layers
from umbrella_train.assembly.build import build_components
from umbrella_train.config import RunConfig

WITH_COMPILER = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++ on a CPU, and there is none"),
]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=WITH_COMPILER)])
def test_new_length_does_not_compile_again(make_config: Callable[..., RunConfig], tmp_path: Path, backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    config = make_config(tmp_path)
    plain, model = build_components(config).model.train(), build_components(config).model.train()
    for layer in [*plain.model.language_model.layers, *model.model.language_model.layers]:
        layer.self_attn.attention_dropout = 0.0
    compile_layers(model, backend=backend)
    graphs = []
    for length in (5, 9, 14):
        ids = torch.randint(1, 200, (2, length), generator=torch.Generator().manual_seed(length))
        losses = [each(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss for each in (model, plain)]
        torch.testing.assert_close(*losses)
        losses[0].backward()
        graphs.append((counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]))
    assert graphs[0][0] > 0
    assert set(graphs) == {graphs[0]}
