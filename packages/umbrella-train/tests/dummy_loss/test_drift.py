"""The measured drift in one process; `tests/test_two_ranks.py` compares it with copies of weights on each engine."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from umbrella_model import set_trainable
from umbrella_train.dummy_loss import drift_monitor
from umbrella_train.dummy_loss.drift_monitor import DRIFT_NAME, WARNING_STEPS, DriftWatch

# dMRI is in the first step, then absent for the rest; rsfMRI is never there.
VANISHES = [[("T1", "dMRI")], *([[("T1",)]] * 5)]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.fixture
def tower(make_model):
    return make_model().model.vision_tower


def move(tower, modality, by):
    with torch.no_grad():
        for parameter in tower.patch_embed(modality).parameters():
            parameter.add_(by)


def test_drift_is_the_distance_to_where_the_modality_was_last_seen(tower):
    std = tower.patch_embed("dMRI").proj.weight.std().item()
    watch = DriftWatch(tower)
    measured = []
    for step, present in enumerate([{"T1"}, {"T1"}, {"T1", "dMRI"}, {"T1"}]):
        watch.before_step(frozenset(present), step=step)
        move(tower, "dMRI", by=0.01)
        measured.append(watch.measure(step=step + 1))
    assert [row["drift/dMRI"] for row in measured] == pytest.approx([0.01 / std, 0.02 / std, 0, 0.01 / std], rel=1e-5)
    assert all(row["drift/T1"] == row["drift/rsfMRI"] == 0 for row in measured)


def test_drift_is_measured_if_only_some_parameters_are_trained(tower):
    tower.patch_embed("T1").requires_grad_(False)
    embed = tower.patch_embed("dMRI").requires_grad_(False)
    embed.proj.weight.requires_grad_(True)
    watch = DriftWatch(tower)
    watch.before_step(frozenset(), step=0)
    with torch.no_grad():
        embed.proj.bias.add_(1.0)
    assert watch.measure(step=1) == {"drift/rsfMRI": 0, "drift/dMRI": 0}
    std = embed.proj.weight.std().item()
    move(tower, "dMRI", by=0.01)
    assert watch.measure(step=1)["drift/dMRI"] == pytest.approx(0.01 / std, rel=1e-5)


def test_unit_is_the_spread_of_a_tensor_that_is_not_constant(tower):
    embed = tower.patch_embed("T1")
    with torch.no_grad():
        embed.proj.weight.zero_()  # as the second of two adapters starts
    watch = DriftWatch(tower)
    watch.before_step(frozenset(), step=0)
    std = embed.position_embedding.std().item()
    move(tower, "T1", by=0.01)
    assert watch.measure(step=1)["drift/T1"] == pytest.approx(0.01 / std, rel=1e-5)


def test_adapters_are_measured(make_model):
    model = make_model()
    set_trainable(model, {"patch_embed": "lora"})
    tower = model.model.vision_tower
    trainable = {key: each for key, each in tower.patch_embed("dMRI").named_parameters() if each.requires_grad}
    (down,) = (each for key, each in trainable.items() if "lora_A" in key)
    std, count = down.std().item(), sum(each.numel() for each in trainable.values())
    watch = DriftWatch(tower)
    watch.before_step(frozenset(), step=0)
    with torch.no_grad():
        down.add_(0.01)
    expected = 0.01 * (down.numel() / count) ** 0.5 / std
    assert watch.measure(step=1)["drift/dMRI"] == pytest.approx(expected, rel=1e-5)


def test_copies_are_kept_only_while_a_modality_is_absent(tower, tmp_path):
    watch = DriftWatch(tower)
    for step, present in enumerate([{"T1"}, {"T1", "dMRI"}]):
        watch.before_step(frozenset(present), step=step)
    watch.save(tmp_path)
    assert {key.split("/")[0] for key in load_file(tmp_path / DRIFT_NAME)} == {"rsfMRI"}


# ---- warning ----


def test_drift_is_warned_of_once_with_the_setting_that_prevents_it(tower, caplog):
    watch = DriftWatch(tower)
    std = tower.patch_embed("dMRI").proj.weight.std().item()
    with caplog.at_level(logging.WARNING):
        # The drift of 0.03 after few steps is that of momentum.
        for step, distance in ((1, 0.03), (WARNING_STEPS, -0.011), (WARNING_STEPS + 1, 0.002), (90, 0.03)):
            watch.before_step(frozenset({"T1", "rsfMRI"}), step=0)
            move(tower, "dMRI", by=distance * std)
            watch.measure(step=step)
            assert len(caplog.records) == (step > WARNING_STEPS)
    assert caplog.messages[0].startswith(f"dMRI has been absent for {WARNING_STEPS + 1} steps")
    assert "2.1 %" in caplog.messages[0]
    assert "dummy_loss.absent: hold" in caplog.messages[0]


def test_trainer_warns_of_a_modality_that_drifts(train_batches, caplog, monkeypatch):
    monkeypatch.setattr(drift_monitor, "WARNING_STEPS", 2)
    with caplog.at_level(logging.WARNING, logger="umbrella_train.dummy_loss.drift_monitor"):
        train_batches([[("T1",), ("rsfMRI",)]] * 12, optim="adamw_torch", learning_rate=0.05)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["dMRI"]


# ---- trainer ----


@pytest.mark.parametrize("absent", ["update", "hold"])
def test_hold_is_a_drift_of_exactly_zero(absent, train_batches):
    rows = train_batches(VANISHES, dummy_loss={"absent": absent}, **ADAM).log
    drift = [row[f"drift/{name}"] for row in rows[1:] for name in ("rsfMRI", "dMRI")]
    assert (min(drift) > 0) == (absent == "update")
    assert absent == "update" or set(drift) == {0.0}


def test_drift_is_that_of_the_logged_step_if_not_every_step_is_logged(train_batches):
    every, second = (train_batches(VANISHES, logging_steps=steps, **ADAM).log for steps in (1, 2))
    for name in ("drift/rsfMRI", "drift/dMRI"):
        assert [row[name] for row in second] == [row[name] for row in every][1::2]


@pytest.mark.parametrize("save_at", [1, 3], ids=["when-last-seen", "while-absent"])
def test_resumed_run_measures_what_an_unbroken_one_does(save_at, make_trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(drift_monitor, "WARNING_STEPS", 2)
    options = {**ADAM, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": save_at, "save_total_limit": None}
    trainer = make_trainer(VANISHES, **options)
    trainer.train()
    whole = [row for row in trainer.state.log_history if "loss" in row]
    warned = [message.split()[0] for message in caplog.messages if "has been absent" in message]
    assert sorted(warned) == ["dMRI", "rsfMRI"]
    checkpoint = tmp_path / "trainer" / f"checkpoint-{save_at}"
    caplog.clear()
    resumed = make_trainer(VANISHES, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    again = [row for row in resumed.state.log_history if "loss" in row]
    for name in ("drift/rsfMRI", "drift/dMRI"):
        assert [row[name] for row in again] == [row[name] for row in whole]
        assert whole[-1][name] > whole[save_at][name] > 0
    with safe_open(checkpoint / DRIFT_NAME, framework="pt") as stored:
        before = json.loads(stored.metadata()["state"])["warned"]
    again_warned = [message.split()[0] for message in caplog.messages if "has been absent" in message]
    assert sorted([*before, *again_warned]) == sorted(warned)


def test_checkpoint_without_copies_is_resumed_with_a_warning(make_trainer, tmp_path, caplog):
    options = {**ADAM, "save_strategy": "steps", "save_steps": 3}
    make_trainer(VANISHES, **options).train()
    checkpoint = tmp_path / "trainer" / "checkpoint-3"
    (checkpoint / DRIFT_NAME).unlink()
    resumed = make_trainer(VANISHES, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [message for message in caplog.messages if DRIFT_NAME in message]
    rows = [row for row in resumed.state.log_history if "loss" in row]
    assert 0 < rows[3]["drift/dMRI"] < rows[2]["drift/dMRI"]
