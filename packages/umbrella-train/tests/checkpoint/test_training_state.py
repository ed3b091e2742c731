"""Optimizer, schedule and scaler are restored from safetensors and JSON; a state that does not match is rejected."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from umbrella_train.checkpoint.training_state import STATE_NAME, TENSORS_NAME, load_training_state, save_training_state
from umbrella_train.distributed.fsdp2 import load_whole_state
from umbrella_train.errors import RunError


def build(kind=torch.optim.AdamW, lr=0.1, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = kind(model.parameters(), lr=lr, **settings)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))


def train(model, optimizer, scheduler, *, steps, skip=()):
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in skip:
                parameter.grad = None
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"fused": True, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
    ids=["fused", "foreach", "sgd"],
)
def test_resumed_optimizer_steps_like_the_saved_one(tmp_path, kind, settings):
    model, optimizer, scheduler = build(kind, **settings)
    # One weight is never stepped, as under hold.
    train(model, optimizer, scheduler, steps=3, skip=("0.bias",))
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    other, resumed, other_scheduler = build(kind, **settings)
    other.load_state_dict(model.state_dict())
    load_training_state(tmp_path, model=other, optimizer=resumed, scheduler=other_scheduler)
    assert other[0].bias not in resumed.state
    for one in ((model, optimizer, scheduler), (other, resumed, other_scheduler)):
        train(*one, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]
    if "betas" in settings:
        assert resumed.param_groups[0]["betas"] == (0.8, 0.9)


def test_scaler_is_restored(tmp_path):
    parts = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    train(*parts, steps=1)
    save_training_state(tmp_path, model=parts[0], optimizer=parts[1], scheduler=parts[2], scaler=scaler)
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    load_training_state(tmp_path, model=parts[0], optimizer=parts[1], scheduler=parts[2], scaler=fresh)
    assert fresh.get_scale() == 8.0


@pytest.mark.parametrize("missing", [TENSORS_NAME, STATE_NAME])
def test_checkpoint_without_its_state_is_rejected(tmp_path, missing):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=1)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    (tmp_path / missing).unlink()
    with pytest.raises(RunError, match="without"):
        load_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)


def test_changed_layout_is_warned_of(tmp_path, caplog):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=1)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    save_training_state(tmp_path, **state, layout={"ranks": 2})
    load_training_state(tmp_path, **state, layout={"ranks": 2})
    assert not caplog.records
    load_training_state(tmp_path, **state, layout={"ranks": 3})
    assert "{'ranks': 2}" in caplog.text
    assert "{'ranks': 3}" in caplog.text


def test_changed_settings_are_applied_and_warned_of(tmp_path, caplog):
    model, optimizer, scheduler = build(betas=(0.8, 0.9), weight_decay=0.1)
    train(model, optimizer, scheduler, steps=1)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    load_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert not caplog.records
    other, changed, other_scheduler = build(lr=7.0, betas=(0.8, 0.9), weight_decay=0.2)
    load_training_state(tmp_path, model=other, optimizer=changed, scheduler=other_scheduler)
    assert "learning_rate 7.0 (before: 0.1)" in caplog.text
    assert "weight_decay 0.2 (before: 0.1)" in caplog.text
    assert "betas" not in caplog.text
    (group,) = changed.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (7.0 / 2, 0.2, (0.8, 0.9))
    assert other_scheduler.get_last_lr() == [7.0 / 2]
    train(other, changed, other_scheduler, steps=1)
    assert group["lr"] == pytest.approx(7.0 / 3)


def test_changed_schedule_is_warned_of(tmp_path, caplog):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=3)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    other, resumed, _ = build(lr=0.2)
    constant = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
    load_training_state(tmp_path, model=other, optimizer=resumed, scheduler=constant)
    assert resumed.param_groups[0]["lr"] == 0.2
    assert "the learning rate is 0.2 instead of 0.05" in caplog.text


def test_a_changed_schedule_of_groups_with_one_rate_is_warned_of_once(tmp_path, caplog):
    model, _, _ = build()
    names = sorted(dict(model.named_parameters()))
    groups = [{"params": [model.get_parameter(name)], "weight_decay": 0.1 * i} for i, name in enumerate(names)]
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=0.1)
    halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    train(model, optimizer, halving, steps=1)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=halving)
    resumed = torch.optim.AdamW([dict(group) for group in groups], lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
    load_training_state(tmp_path, model=model, optimizer=resumed, scheduler=constant)
    (record,) = caplog.records
    assert record.args == (0.1, 0.05)
    assert [group["lr"] for group in resumed.param_groups] == [0.1] * len(groups)


def test_plateau_schedule_scales_with_a_changed_learning_rate(tmp_path):
    state = {}
    for name, rate in (("before", 0.1), ("after", 0.4)):
        model, optimizer, _ = build(lr=rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        optimizer.param_groups[0]["initial_lr"] = rate
        state[name] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for _ in range(2):
        state["before"]["scheduler"].step(1.0)
    save_training_state(tmp_path, **state["before"])
    load_training_state(tmp_path, **state["after"])
    assert state["after"]["optimizer"].param_groups[0]["lr"] == pytest.approx(0.2)


def test_weights_of_another_shape_are_rejected_with_their_name(tmp_path):
    save_file(build()[0].state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(RunError, match=r"1\.\w+ has the shape .* and the model's .*"):
        load_whole_state(other, [tmp_path / "model.safetensors"])


def test_another_optimizer_is_rejected(tmp_path):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=1)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    other = build(torch.optim.SGD)
    with pytest.raises(RunError, match="written by AdamW, and this run uses SGD"):
        load_training_state(tmp_path, model=other[0], optimizer=other[1], scheduler=other[2])


def test_other_parameters_are_rejected_with_their_name(tmp_path):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=1)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    facts = json.loads((tmp_path / STATE_NAME).read_text())
    facts["groups"][0]["parameters"].remove("1.bias")
    (tmp_path / STATE_NAME).write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"among them 1\.bias"):
        load_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)


def put_another_shape(tensors):
    tensors["0.weight/exp_avg"] = torch.zeros(3, 3)


def put_a_nan(tensors):
    tensors["1.bias/exp_avg_sq"][0] = float("nan")


def count_too_many_steps(tensors):
    tensors["1.bias/step"] += 1


def drop_a_moment(tensors):
    del tensors["1.weight/exp_avg"]


def drop_all_of_a_kind(tensors):
    for key in [key for key in tensors if key.endswith("/exp_avg_sq")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (put_another_shape, {"0.weight/exp_avg"}),
        (put_a_nan, {"1.bias/exp_avg_sq"}),
        (count_too_many_steps, {"1.bias/step"}),
        (drop_a_moment, {"1.weight/exp_avg"}),
        (drop_all_of_a_kind, {f"{name}/exp_avg_sq" for name in ("0.bias", "0.weight", "1.bias", "1.weight")}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_moments_that_cannot_be_are_rejected_together(tmp_path, damage, named):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, steps=3)
    save_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler)
    load_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, num_steps=3)
    tensors = load_file(tmp_path / TENSORS_NAME)
    damage(tensors)
    save_file(tensors, tmp_path / TENSORS_NAME)
    with pytest.raises(RunError) as raised:
        load_training_state(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, num_steps=3)
    first, *lines = str(raised.value).splitlines()
    assert str(tmp_path / TENSORS_NAME) in first
    assert {line.split(":")[0].strip() for line in lines} == named
