"""Compiled layers: one compilation for all sequence lengths, and equal results."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from umbrella_model import pack_batch, supervised_index

LENGTHS = (3, 8, 5, 13, 21, 17, 30)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def compile_layers(model, backend):
    for layer in [*model.model.vision_tower.encoder.encoder.layers, *model.model.language_model.layers]:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def batch_of(make_batch, words, *, packed):
    batch = make_batch((words, "T1", 2), (words + 4, "T1", 3))
    batch["supervised_index"] = supervised_index(batch["labels"])
    return pack_batch(batch) if packed else batch


def step(model, batch):
    out = model(**batch)
    return [out.loss.detach(), *torch.autograd.grad(out.loss + sum(out.dummy_terms.values()), list(model.parameters()))]


def check_steps(make_model, make_batch, *, backend, lengths, packed):
    """Checks that steps of a compiled model equal those in eager mode, and that only the first step compiles."""
    plain, compiled = make_model(), make_model()
    for model in (plain, compiled):
        model.set_attn_implementation("sdpa")
    compile_layers(compiled, backend)
    graphs = []
    for words in lengths:
        batch = batch_of(make_batch, words, packed=packed)
        for value, expected in zip(step(compiled, batch), step(plain, batch), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
        graphs.append((counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]))
    assert graphs[0][0] > 0
    assert set(graphs) == {graphs[0]}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_layers_are_not_retraced_at_a_new_length(make_model, make_batch, packed):
    check_steps(make_model, make_batch, backend="eager", lengths=LENGTHS, packed=packed)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_layers_equal_eager_at_every_length(make_model, make_batch, packed):
    check_steps(make_model, make_batch, backend="inductor", lengths=(3, 8, 5), packed=packed)
    assert counters["aot_autograd"]["total"] > 0
