"""Facts that ranks share at the end of an accumulation window."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from umbrella_train.trainer.accumulation import AccumulationWindow


def window_with(*losses: float) -> AccumulationWindow:
    window = AccumulationWindow(["rsfMRI", "T1", "dMRI"])
    for loss in losses:
        window.add_loss(torch.tensor(loss))
    return window


def test_present_modalities_are_those_of_all_batches_of_the_window() -> None:
    window = window_with(1.0, 1.0)
    for names in (["T1"], ["dMRI"], []):
        window.see({"pixel_values": dict.fromkeys(names)})
    assert window.close().present == {"T1", "dMRI"}


def test_window_is_reset_when_it_is_closed() -> None:
    window = window_with(math.nan)
    window.see({"pixel_values": {"T1": None}})
    assert not window.close().is_loss_finite
    window.add_loss(torch.tensor(1.0))
    facts = window.close()
    assert facts.present == set()
    assert facts.is_loss_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_non_finite_loss_is_reported_for_the_window(bad: float, position: int) -> None:
    losses = [1.0, 2.0, 3.0]
    assert window_with(*losses).close().is_loss_finite
    losses[position] = bad
    assert not window_with(*losses).close().is_loss_finite


def test_norms_and_stop_request_are_returned() -> None:
    facts = window_with(1.0).close(is_stop_asked=True, norms=torch.tensor([0.25, 4.0], dtype=torch.float64))
    assert facts.is_stop_asked
    assert facts.norms == (0.25, 4.0)
    facts = window_with(1.0).close()
    assert not facts.is_stop_asked
    assert facts.norms == ()


def test_supervised_tokens_are_counted_for_each_modality(
    make_example: Callable[..., Any], collate: Callable[..., Any]
) -> None:
    window = window_with(1.0)
    kinds = [("T1",), ("T1", "dMRI"), (), ("T1", "T1")]
    # The answer of example i has 2 + i % 4 tokens.
    window.see(collate([make_example(kind, index) for index, kind in enumerate(kinds)]))
    facts = window.close()
    assert facts.num_tokens == 2 + 3 + 4 + 5
    assert {name: facts.tokens_with.get(name, 0) for name in ("T1", "dMRI", "rsfMRI")} == {
        "T1": 2 + 3 + 5,
        "dMRI": 3,
        "rsfMRI": 0,
    }


def test_non_finite_gradient_is_reported_separately_from_the_loss() -> None:
    window = window_with(1.0)
    facts = window.close(has_bad_gradient=torch.tensor(True))
    assert (facts.is_loss_finite, facts.is_gradient_finite) == (True, False)
    window.add_loss(torch.tensor(1.0))
    assert window.close(has_bad_gradient=torch.tensor(False)).is_gradient_finite


def test_facts_of_all_ranks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(facts: torch.Tensor) -> None:
        other = window_with(1.0)
        other.see({"pixel_values": {"dMRI": None}})
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: False)
            there: list[torch.Tensor] = []
            patch.setattr(torch, "cat", lambda parts, cat=torch.cat: there.append(cat(parts)) or there[0])
            other.close(is_stop_asked=True, norms=torch.tensor([1.0], dtype=torch.float64))
        facts += there[0]

    window = window_with(1.0)
    window.see({"pixel_values": {"T1": None}})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    facts = window.close(norms=torch.tensor([2.0], dtype=torch.float64))
    assert facts.present == {"T1", "dMRI"}
    assert facts.is_stop_asked
    assert facts.is_loss_finite
    assert facts.norms == (3.0,)
