"""The dummy gradient with a loss scaler and autocast: its norm equals the scale."""

from __future__ import annotations

import pytest
import torch

from umbrella_train.dummy_loss.loss import DummyLoss


def dummy_norms(model, *, parts=("rsfMRI", "dMRI")):
    tower = model.model.vision_tower
    norms = {}
    for name in parts:
        gradients = [parameter.grad.double().norm() for parameter in tower.patch_embed(name).parameters()]
        norms[name] = torch.stack(gradients).norm().item()
    return norms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_norm_is_the_scale_after_unscaling(make_model, make_example, collate, dtype, tolerance):
    model = make_model().to(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert scaler.is_enabled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**collate([make_example(("T1",), 0), make_example(("T1",), 1)]))
    scaler.scale(out.loss + DummyLoss()(out.dummy_terms)).backward()
    assert dummy_norms(model) == pytest.approx(dict.fromkeys(("rsfMRI", "dMRI"), 1024e-7), rel=tolerance)
    if dtype == torch.float32:
        scaler.unscale_(optimizer)
        assert dummy_norms(model) == pytest.approx(dict.fromkeys(("rsfMRI", "dMRI"), 1e-7), rel=tolerance)
