"""The forecast of drift, compared with steps of real optimizers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from transformers.optimization import Adafactor

from umbrella_train.dummy_loss.drift import DriftForecast, OptimizerFacts
from umbrella_train.dummy_loss.drift_monitor import DriftWatch
from umbrella_train.dummy_loss.loss import DummyLoss

STEPS, ELEMENTS, REAL_NORM = 600, 4000, 0.01


def measured_drift(*, count, gradient_norm, every, learning_rate, rule="adam", steps=STEPS):
    """Mean distance between elements stepped with the dummy gradient and the same without it, in float64."""
    ends = []
    for gradient in (gradient_norm / math.sqrt(count), 0.0):
        weights = torch.zeros(ELEMENTS, dtype=torch.float64, requires_grad=True)
        kind = torch.optim.AdamW if rule == "adam" else torch.optim.SGD
        extra = {"weight_decay": 0.0} if rule == "adam" else {"momentum": 0.9}
        optimizer = kind([weights], lr=learning_rate, **extra)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            weights.grad = torch.full_like(weights, gradient)
            if every and step % every == 0:
                real = torch.randn(ELEMENTS, dtype=torch.float64, generator=generator)
                weights.grad = real * REAL_NORM / math.sqrt(count)
            optimizer.step()
        ends.append(weights.detach())
    return (ends[0] - ends[1]).abs().mean().item()


def forecast_drift(*, count, gradient_norm, every, learning_rate, rule="adam", steps=STEPS):
    facts = OptimizerFacts() if rule == "adam" else OptimizerFacts("sgd", beta1=0.9)
    forecast = DriftForecast(num_elements=count, gradient_norm=gradient_norm, optimizer=facts)
    for step in range(steps):
        is_seen = every and step % every == 0
        forecast.step(learning_rate=learning_rate, real_norm=REAL_NORM if is_seen else None)
    return forecast


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("every", [0, 10, 50], ids=["never", "1-in-10", "1-in-50"])
@pytest.mark.parametrize("count", [50_000, 10_000_000])
@pytest.mark.parametrize("reduction", ["unit", "sum"])
def test_forecast_is_within_ten_per_cent(rule, every, count, reduction):
    norm = DummyLoss(reduction=reduction, sizes={"T1": count}).weight("T1")
    situation = {"count": count, "gradient_norm": norm, "every": every, "learning_rate": 5e-5, "rule": rule}
    assert forecast_drift(**situation).total == pytest.approx(measured_drift(**situation), rel=0.1)


@pytest.mark.parametrize(("reduction", "documented"), [("unit", 0.011), ("sum", 2.27)])
def test_documented_drift_of_a_patch_embed_of_1152_by_4096(reduction, documented):
    count = 1152 * 4096
    norm = DummyLoss(reduction=reduction, sizes={"T1": count}).weight("T1")
    situation = {"count": count, "gradient_norm": norm, "every": 0, "learning_rate": 5e-5, "steps": 1000}
    drift = measured_drift(**situation) / 0.02
    assert drift == pytest.approx(documented, rel=0.05)
    assert reduction == "sum" or drift < 0.02
    assert forecast_drift(**situation).total / 0.02 == pytest.approx(drift, rel=0.01)


@pytest.mark.parametrize("every", [0, 10], ids=["never", "1-in-10"])
def test_forecast_for_adafactor_is_within_ten_per_cent(every):
    shape, norm, rate = (40, 50), 1e-7, 5e-5
    ends = []
    for gradient in (norm / math.sqrt(2000), 0.0):
        weights = torch.zeros(shape, requires_grad=True)
        optimizer = Adafactor([weights], lr=rate, scale_parameter=False, relative_step=False)
        generator = torch.Generator().manual_seed(0)
        for step in range(300):
            weights.grad = torch.full(shape, gradient)
            if every and step % every == 0:
                weights.grad = torch.randn(shape, generator=generator) * REAL_NORM / math.sqrt(2000)
            optimizer.step()
        ends.append(weights.detach().clone())
    measured = (ends[0] - ends[1]).abs().mean().item()
    forecast = DriftForecast(num_elements=2000, gradient_norm=norm, optimizer=OptimizerFacts("adafactor"))
    for step in range(300):
        forecast.step(learning_rate=rate, real_norm=REAL_NORM if every and step % every == 0 else None)
    assert forecast.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("limit", [0.0, 1.0, 0.05], ids=["free", "clipped", "clipped-hard"])
def test_logged_drift_is_the_distance_of_the_weights(train_batches, limit):
    trained = train_batches([[("T1",)]] * 30, optim="adamw_torch", learning_rate=1e-3, max_grad_norm=limit)
    name = "model.vision_tower.dMRI_patch_embed.proj.weight"
    before, after = trained.before[name], trained.trainer.model.state_dict()[name]
    moved = (after - before).double().mean().abs() / before.double().std()
    assert trained.log[-1]["drift/dMRI"] == pytest.approx(moved.item(), rel=0.1)
    assert trained.log[0]["drift/T1"] == 0


def test_trainer_warns_of_a_modality_that_drifts(train_batches, caplog):
    with caplog.at_level(logging.WARNING, logger="umbrella_train.dummy_loss.drift_monitor"):
        train_batches([[("T1",), ("rsfMRI",)]] * 12, optim="adamw_torch", learning_rate=0.05)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["dMRI"]


def test_spread_is_that_of_a_tensor_that_is_not_constant(watched):
    tower, optimizer = watched
    embed = tower.patch_embed("T1")
    with torch.no_grad():
        embed.proj.weight.zero_()  # as the second of two adapters starts
    watch = DriftWatch(tower, optimizer=optimizer, dummy_loss=DummyLoss())
    assert watch.state_dict()["spread"]["T1"] == pytest.approx(embed.position_embedding.std().item())


def test_drift_is_reset_when_the_modality_is_present():
    forecast = forecast_drift(count=1000, gradient_norm=1e-7, every=0, learning_rate=1e-3, steps=20)
    assert forecast.steps_absent == 20
    assert forecast.since_seen == forecast.total > 0
    forecast.step(learning_rate=1e-3, real_norm=REAL_NORM)
    assert (forecast.steps_absent, forecast.since_seen) == (0, 0.0)
    assert forecast.total > 0


@pytest.fixture
def watched(make_model):
    tower = make_model().model.vision_tower
    return tower, torch.optim.AdamW(tower.parameters(), lr=1e-2)


def test_drift_is_warned_of_once_with_the_setting_that_prevents_it(watched, caplog):
    tower, optimizer = watched
    watch = DriftWatch(tower, optimizer=optimizer, dummy_loss=DummyLoss())
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            watch.step(frozenset({"T1"}))
            watch.learn({"T1": 0.1})
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2
    assert all("dummy_loss.absent: hold" in words for words in named)
    assert {words.split()[0] for words in named} == {"rsfMRI", "dMRI"}
    assert watch.as_log()["drift/T1"] == 0
    assert watch.as_log()["drift/dMRI"] > 0.02


def test_unknown_optimizer_has_no_forecast(watched):
    tower, _ = watched
    watch = DriftWatch(tower, optimizer=torch.optim.Adagrad(tower.parameters()), dummy_loss=DummyLoss())
    watch.step(frozenset())
    assert watch.as_log() == {}


def test_resumed_run_continues_the_forecast(make_trainer, tmp_path):
    batches = [[("T1",)]] * 4
    saving = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(batches, **saving)
    trainer.train()
    whole = [row for row in trainer.state.log_history if "loss" in row]
    resumed = make_trainer(batches, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    again = [row for row in resumed.state.log_history if "loss" in row]
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    for name in ("drift/rsfMRI", "drift/dMRI"):
        assert [row[name] for row in again] == [row[name] for row in whole]
        assert whole[3][name] > whole[1][name] > 0
