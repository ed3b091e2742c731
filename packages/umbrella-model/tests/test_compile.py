"""Compiled layers: one code for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from umbrella_model import pack_batch, supervised_index


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_layers_do_not_compile_again_at_a_new_length(make_model, make_batch, packed):
    torch._dynamo.reset()
    counters.clear()
    model = make_model()
    model.set_attn_implementation("sdpa")
    for layer in [*model.model.vision_tower.encoder.encoder.layers, *model.model.language_model.layers]:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend="eager")
    graphs = []
    for words in (3, 8, 5, 13, 21, 17, 30):
        batch = make_batch((words, "T1", 2), (words + 4, "T1", 3))
        batch["supervised_index"] = supervised_index(batch["labels"])
        out = model(**(pack_batch(batch) if packed else batch))
        (out.loss + sum(out.dummy_terms.values())).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
