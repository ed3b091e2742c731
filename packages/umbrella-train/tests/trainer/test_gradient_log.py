"""The gradient log: its keys, and norms computed independently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Train = Callable[..., Any]


def norms_of(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("grad/")}


def test_keys_contain_the_modality_or_inactive(train_batches: Train) -> None:
    first, second = train_batches([[("T1",), ()], [("T1", "dMRI"), ("rsfMRI",)]]).log
    assert set(norms_of(first)) == {
        "grad/[inactive]/vision_tower.rsfMRI_patch_embed",
        "grad/[inactive]/vision_tower.rsfMRI_patch_embed.proj",
        "grad/[T1]/vision_tower.T1_patch_embed",
        "grad/[T1]/vision_tower.T1_patch_embed.proj",
        "grad/[inactive]/vision_tower.dMRI_patch_embed",
        "grad/[inactive]/vision_tower.dMRI_patch_embed.proj",
    }
    assert {key.split("[")[1].split("]")[0] for key in norms_of(second)} == {"T1", "dMRI", "rsfMRI"}


def test_values_are_the_norms_of_the_gradients(train_batches: Train) -> None:
    trained = train_batches([[("T1",), ()], [("dMRI",), ("rsfMRI",)]])
    for step, row in enumerate(trained.log):
        found = norms_of(row)
        assert len(found) == 6
        for key, value in found.items():
            modality = key.split("vision_tower.")[1].split("_patch_embed")[0]
            part = "proj." if key.endswith(".proj") else ""
            assert value == pytest.approx(trained.norm(modality, step=step, part=part), rel=1e-5)
        for name in ("T1", "rsfMRI", "dMRI"):
            # Positions are part of a patch embed, but not of its projection.
            whole, projection = (
                next(value for key, value in found.items() if key.endswith(f"{name}_patch_embed{part}"))
                for part in ("", ".proj")
            )
            assert 0 < projection < whole


def test_modality_is_active_when_any_batch_of_the_window_has_it(train_batches: Train) -> None:
    trained = train_batches(
        [[("T1",)], [("dMRI",)], [("T1",)], [("T1",)]], gradient_accumulation_steps=2, logging_steps=1
    )
    labels = [{key.split("[")[1].split("]")[0] for key in norms_of(row)} for row in trained.log]
    assert labels == [{"T1", "dMRI", "inactive"}, {"T1", "inactive"}]


def test_norms_are_those_before_clipping(train_batches: Train) -> None:
    clipped, free = (train_batches([[("T1",), ("T1",)]], max_grad_norm=limit) for limit in (1e-3, 0.0))
    assert norms_of(clipped.log[0]) == norms_of(free.log[0])
    assert clipped.norm("T1") < 0.1 * free.norm("T1")


def test_norms_are_computed_only_at_logging_steps(train_batches: Train) -> None:
    trained = train_batches([[("T1",)], [("dMRI",)]] * 2, logging_steps=2)
    assert [row["step"] for row in trained.log] == [2, 4]
    assert all(len(norms_of(row)) == 6 for row in trained.log)
    assert trained.log[0]["grad/[dMRI]/vision_tower.dMRI_patch_embed"] == pytest.approx(trained.norm("dMRI", step=1))


@pytest.mark.parametrize(
    ("strategy", "lines"),
    [({"logging_steps": 3, "logging_first_step": True}, 2), ({"logging_steps": 9, "logging_strategy": "epoch"}, 1)],
)
def test_every_line_has_the_norms_of_its_step(train_batches: Train, strategy: dict[str, Any], lines: int) -> None:
    trained = train_batches([[("T1",)], [("rsfMRI",)], [("T1",)]], **strategy)
    assert len(trained.log) == lines
    for line in trained.log:
        assert line["grad/[T1]/vision_tower.T1_patch_embed"] == pytest.approx(
            trained.norm("T1", step=int(line["step"]) - 1), rel=1e-5
        )
        assert {"drift/T1", "drift/rsfMRI", "drift/dMRI"} <= line.keys()


def test_share_is_the_norm_divided_by_the_total_norm(train_batches: Train) -> None:
    trained = train_batches([[("T1",)], [("dMRI",), ("rsfMRI",)]])
    for step, row in enumerate(trained.log):
        gradients = trained.gradients[step].values()
        total = torch.stack([each.double().norm() for each in gradients if each is not None]).norm().item()
        assert row["grad_norm"] == pytest.approx(total, rel=1e-4)
        shares = {key: value for key, value in row.items() if key.startswith("grad_share/")}
        assert len(shares) == 3
        for key, share in shares.items():
            assert share == pytest.approx(row[key.replace("grad_share/", "grad/")] / total, rel=1e-4)
