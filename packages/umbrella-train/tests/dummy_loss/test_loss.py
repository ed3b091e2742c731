"""The dummy loss: weights, sums and errors."""

from __future__ import annotations

import math

import pytest
import torch

from umbrella_train.dummy_loss.loss import DummyLoss


def terms_of(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


def test_loss_is_scale_times_the_sum_of_the_terms() -> None:
    terms = terms_of(T1=3.0, dMRI=-1.0)
    loss = DummyLoss(scale=0.5)(terms)
    assert (loss.shape, loss.dtype, loss.item()) == ((), torch.float32, 1.0)
    loss.backward()
    assert [float(term.grad) for term in terms.values()] == [0.5, 0.5]


def test_sum_reduction_weights_a_term_by_the_root_of_its_size() -> None:
    dummy_loss = DummyLoss(scale=0.25, reduction="sum", sizes={"T1": 16, "dMRI": 9})
    assert (dummy_loss.weight("T1"), dummy_loss.weight("dMRI")) == (1.0, 0.75)
    assert dummy_loss(terms_of(T1=1.0, dMRI=4.0)).item() == 4.0


@pytest.mark.parametrize("terms", [None, {}])
def test_loss_is_zero_without_a_graph_when_nothing_is_absent(terms: dict[str, torch.Tensor] | None) -> None:
    loss = DummyLoss()(terms)
    assert loss.item() == 0
    assert not loss.requires_grad


def test_scale_zero_keeps_the_graph() -> None:
    terms = terms_of(T1=3.0)
    DummyLoss(scale=0)(terms).backward()
    assert terms["T1"].grad is not None
    assert terms["T1"].grad.item() == 0


@pytest.mark.parametrize("scale", [-1e-7, math.inf, math.nan])
def test_scale_when_negative_or_not_finite_is_rejected(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"scale must be finite and not negative, got {scale}"):
        DummyLoss(scale=scale)


def test_reduction_when_unknown_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be 'unit' or 'sum', got 'mean'"):
        DummyLoss(reduction="mean")  # type: ignore[arg-type]


def test_sum_reduction_without_sizes_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"sizes=model\.dummy_sizes\(\)"):
        DummyLoss(reduction="sum")
