"""Learning rates of single parts of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from umbrella_model.parts import named_part_parameters

BATCHES = [[("T1",), ()], [("T1", "dMRI")]]


def moved(trained: Any) -> dict[str, float]:
    """Learning rate of each part, from the move of its parameters per unit of gradient (plain gradient descent)."""
    model = trained.trainer.model
    rates: dict[str, set[float]] = {}
    for part, name, parameter in named_part_parameters(model):
        gradient = sum(step[name] for step in trained.gradients)
        if gradient.abs().max() > 1e-6:
            # One number per tensor: the least squares slope of the move over the sum of gradients.
            move = (trained.before[name] - parameter.detach()).double().flatten()
            slope = float(move @ gradient.double().flatten() / gradient.double().square().sum())
            rates.setdefault(part, set()).add(round(slope, 4))
    return {part: slopes.pop() for part, slopes in rates.items() if len(slopes) == 1}


def test_parts_use_their_rates_and_the_log_has_the_common_one(train_batches: Callable[..., Any]) -> None:
    trained = train_batches(BATCHES, part_learning_rates={"projector": 0.01, "patch_embed": 0.002})
    assert moved(trained) == {
        "patch_embed": pytest.approx(0.002),
        "vision_tower": pytest.approx(0.05),
        "projector": pytest.approx(0.01),
        "language_model": pytest.approx(0.05),
        "embeddings": pytest.approx(0.05),
    }
    assert trained.log[0]["learning_rate"] == 0.05


def test_weight_decay_of_groups_equals_that_of_hugging_face(make_trainer: Callable[..., Any]) -> None:
    def decayed(**options: Any) -> set[str]:
        trainer = make_trainer(weight_decay=0.1, **options)
        optimizer = trainer.create_optimizer()
        assert isinstance(optimizer, torch.optim.SGD)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = [group for group in optimizer.param_groups if group["weight_decay"] > 0]
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    assert decayed(part_learning_rates={"projector": 0.01}) == decayed()
