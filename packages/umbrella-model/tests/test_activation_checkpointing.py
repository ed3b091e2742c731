"""Activation checkpointing of selected parts: which layers are recomputed, and equal gradients."""

from __future__ import annotations

import pytest
import torch

from umbrella_model import checkpoint_parts

ROWS = ((3, "T1", 2), (5,))


def step(model, batch):
    """Gradients, and the number of calls of the first layer of each part."""
    calls = {"vision_tower": 0, "language_model": 0}

    def count(part):
        def hook(*_):
            calls[part] += 1

        return hook

    layers = {
        "vision_tower": model.model.vision_tower.encoder.encoder.layers[0],
        "language_model": model.model.language_model.layers[0],
    }
    for part, layer in layers.items():
        layer.mlp.register_forward_pre_hook(count(part))
    out = model(**batch)
    grads = torch.autograd.grad(out.loss + sum(out.dummy_terms.values()), list(model.parameters()))
    return grads, calls


@pytest.mark.parametrize("parts", [("vision_tower",), ("language_model",), ("vision_tower", "language_model"), ()])
def test_only_named_parts_are_recomputed_and_gradients_are_equal(make_model, make_batch, parts):
    batch = make_batch(*ROWS)
    expected, _ = step(make_model(), batch)
    model = make_model()
    checkpoint_parts(model, parts)
    grads, calls = step(model, batch)
    assert calls == {part: 2 if part in parts else 1 for part in calls}
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_a_single_part_name_is_accepted(make_model):
    model = make_model()
    checkpoint_parts(model, "language_model")
    assert model.model.language_model.gradient_checkpointing
    assert not model.model.vision_tower.encoder.encoder.gradient_checkpointing


@pytest.mark.parametrize("parts", ["projector", ["projector"]])
def test_unsupported_parts_raise(make_model, parts):
    with pytest.raises(ValueError, match=r"projector.*vision_tower, language_model"):
        checkpoint_parts(make_model(), parts)
