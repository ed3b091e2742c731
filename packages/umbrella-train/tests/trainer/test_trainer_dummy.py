"""The dummy loss through the trainer: who receives which gradient, and that nothing else is touched by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

Kinds = list[list[tuple[str, ...]]]
Train = Callable[..., Any]

T1_ALONE: Kinds = [[("T1",), ("T1",)]]


def close_to(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)


def test_each_absent_modality_gets_a_gradient_of_norm_scale(train_batches: Train) -> None:
    trained = train_batches(T1_ALONE)
    assert trained.norm("rsfMRI") == close_to(1e-7)
    assert trained.norm("dMRI") == close_to(1e-7)
    assert trained.norm("T1") > 1e-4


def test_only_the_third_gets_a_term_when_two_are_present(train_batches: Train) -> None:
    trained = train_batches([[("T1",), ("rsfMRI", "T1")]])
    assert trained.norm("dMRI") == close_to(1e-7)
    assert min(trained.norm("T1"), trained.norm("rsfMRI")) > 1e-4


def test_no_term_is_added_when_all_are_present(train_batches: Train) -> None:
    batches: Kinds = [[("T1", "dMRI"), ("rsfMRI",)]]
    # With this scale, any term would be visible.
    with_term = train_batches(batches, dummy_loss={"scale": 1e3}).gradients[0]
    without = train_batches(batches, dummy_loss={"enabled": False}).gradients[0]
    assert all(torch.equal(with_term[name], without[name]) for name in without)


def test_batch_without_scans_trains(train_batches: Train) -> None:
    trained = train_batches([[(), ()]])
    for name in ("T1", "rsfMRI", "dMRI"):
        assert trained.norm(name) == close_to(1e-7)
    gradients = trained.gradients[0]
    assert all(gradient is not None for gradient in gradients.values())
    assert all(not gradients[name].any() for name in gradients if "encoder" in name or "projector" in name)
    after = trained.trainer.model.state_dict()
    moved = [name for name in after if not torch.equal(after[name], trained.before[name])]
    assert any("language_model" in name for name in moved)
    assert not any("encoder" in name or "projector" in name for name in moved)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_dummy_loss_does_not_grow_with_accumulation(train_batches: Train, accumulation: int) -> None:
    trained = train_batches(T1_ALONE * accumulation, gradient_accumulation_steps=accumulation)
    assert len(trained.gradients) == 1
    assert trained.norm("dMRI") == close_to(1e-7)
    assert trained.norm("rsfMRI") == close_to(1e-7)


def test_dummy_loss_is_the_same_in_a_short_window_at_the_end_of_an_epoch(train_batches: Train) -> None:
    trained = train_batches(T1_ALONE * 5, gradient_accumulation_steps=3)
    assert len(trained.gradients) == 2
    assert trained.norm("dMRI", step=1) == close_to(1e-7)


def test_sum_reduction_is_the_sum_of_the_parameters(train_batches: Train) -> None:
    trained = train_batches(T1_ALONE, dummy_loss={"scale": 1e-5, "reduction": "sum"})
    for modality in ("rsfMRI", "dMRI"):
        found = [
            grad
            for name, grad in trained.gradients[0].items()
            if f"{modality}_patch_embed" in name and grad is not None
        ]
        size = sum(grad.numel() for grad in found)
        assert trained.norm(modality) == close_to(1e-5 * math.sqrt(size))
        assert torch.cat([grad.flatten() for grad in found]).tolist() == pytest.approx([1e-5] * size, rel=1e-4)


def test_scale_zero_gives_exact_zeros(train_batches: Train) -> None:
    trained = train_batches(T1_ALONE, dummy_loss={"scale": 0})
    assert trained.norm("rsfMRI") == 0.0
    assert trained.norm("dMRI") == 0.0


def test_absent_modalities_have_no_gradient_when_the_dummy_loss_is_off(train_batches: Train) -> None:
    trained = train_batches(T1_ALONE, dummy_loss={"enabled": False})
    assert trained.norm("rsfMRI") is None
    assert trained.norm("dMRI") is None
    assert trained.norm("T1") > 1e-4


def test_frozen_patch_embed_has_no_term(train_batches: Train, make_model: Callable[[], Any]) -> None:
    model = make_model()
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    tower.dMRI_patch_embed.requires_grad_(False)
    trained = train_batches(T1_ALONE, model=model)
    assert trained.norm("dMRI") is None
    assert trained.norm("rsfMRI") == close_to(1e-7)
    after = trained.trainer.model.state_dict()
    assert all(torch.equal(after[name], trained.before[name]) for name in after if "dMRI_patch_embed" in name)


def test_partly_frozen_patch_embed_counts_trainable_parameters(
    train_batches: Train, make_model: Callable[[], Any]
) -> None:
    model = make_model()
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    tower.dMRI_patch_embed.proj.weight.requires_grad_(False)
    assert train_batches(T1_ALONE, model=model).norm("dMRI") == close_to(1e-7)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_task_loss_and_other_gradients_do_not_depend_on_the_dummy_loss(train_batches: Train, accumulation: int) -> None:
    batches: Kinds = [[("T1",), ("T1",)], [("T1",), ("T1", "T1")]]
    on, off = (
        train_batches(batches, dummy_loss={"enabled": enabled}, gradient_accumulation_steps=accumulation)
        for enabled in (True, False)
    )
    assert [row["loss"] for row in on.log] == [row["loss"] for row in off.log]
    for with_term, without in zip(on.gradients, off.gradients, strict=True):
        compared = [name for name, gradient in without.items() if gradient is not None]
        assert any("T1_patch_embed" in name for name in compared)
        assert any("language_model" in name for name in compared)
        assert all(torch.equal(with_term[name], without[name]) for name in compared)


def test_logged_loss_has_no_dummy_loss(train_batches: Train) -> None:
    with_term, without = (
        train_batches(T1_ALONE, dummy_loss=settings).log[0]["loss"] for settings in ({"scale": 1e3}, {"enabled": False})
    )
    assert with_term == without
