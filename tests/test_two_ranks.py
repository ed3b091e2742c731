"""Two gloo ranks with different modalities, with the real trainer, model and collator."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Case, run_case
from launching import launch_warm
from safetensors.torch import load_file
from toy import ORDER

DRIFTING = [
    Case(
        f"drift-{optim}-{engine}",
        "returns",
        steps=6,
        optim=optim,
        engine=engine,
        arguments={"weight_decay": 0.1},
        compare_drift=True,
    )
    for engine in ("ddp", "fsdp2")
    for optim in ("adamw_torch_fused", "sgd", "muon", "adafactor")
]
# Saved in an absence of dMRI and of rsfMRI.
SAVED = replace(DRIFTING[4], name="saved", steps=3, arguments={"save_strategy": "steps", "save_steps": 2})
RESUMED = replace(SAVED, name="resumed", compare_drift=False)
CASES = [
    Case("different", "different", steps=20),
    Case("random", "random", steps=6),
    Case("text", "text", steps=4),
    Case("accumulated", "random", steps=4, accumulation=2),
    *DRIFTING,
    Case("off", "different", steps=4, dummy_loss={"enabled": False}),
]
# The second step is not finite on one rank.
PLAIN = [
    Case(
        f"one-step-{engine}",
        "different",
        steps=1,
        accumulation=2,
        optim="adamw_torch_fused",
        engine=engine,
        arguments={"weight_decay": 0.1, "max_grad_norm": 1.0},
    )
    for engine in ("ddp", "fsdp2")
]
SKIPPING = [
    replace(case, name=f"skip-{steps}-{case.engine}", steps=steps, sabotage="nan", on_non_finite="skip")
    for case in PLAIN
    for steps in (2, 3)
]
STOPPED = replace(PLAIN[0], name="stopped", steps=3, sabotage="nan")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    resumed = replace(RESUMED, resume=str(folder / f"{SAVED.name}-run" / "checkpoint-2"))
    launch_warm([SAVED, resumed, *PLAIN, *SKIPPING, STOPPED, *CASES], folder, num_ranks=2, timeout=240)
    return folder


@pytest.mark.parametrize("case", [case for case in CASES[:-1] if case not in DRIFTING], ids=lambda case: case.name)
def test_two_ranks_equal_one_process_when_modalities_differ(case, results, tmp_path):
    first, second = (load_file(results / f"{case.name}-{rank}.safetensors") for rank in (0, 1))
    for rank in (0, 1):
        assert json.loads((results / f"{case.name}-{rank}.json").read_text())["error"] is None
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run_case(case, output=tmp_path, simulated_world_size=2)["error"] is None
    reference = load_file(tmp_path / f"{case.name}-0.safetensors")
    assert max((first[name] - reference[name]).abs().max().item() for name in first) < 1e-6


def test_ddp_without_the_dummy_loss_is_an_error_with_its_key(results):
    error = json.loads((results / "off-0.json").read_text())["error"]
    assert error is not None
    assert "dummy_loss.enabled: true" in error


def test_log_has_separate_keys_for_active_and_inactive_modalities(results):
    row = json.loads((results / "different-0.json").read_text())["log"][0]
    assert row["grad/[rsfMRI]/vision_tower.rsfMRI_patch_embed.proj"] > 1e-4
    assert row["grad/[inactive]/vision_tower.dMRI_patch_embed"] == pytest.approx(1e-7, rel=1e-4)


# ---- drift ----


def check_drift(result: dict[str, Any]) -> list[dict[str, float]]:
    """Compares the logged drift with copies of the weights; T1 is always present, dMRI in steps 1 and 4 only."""
    rows = [{name: row[f"drift/{name}"] for name in ORDER} for row in result["log"] if "loss" in row]
    assert [[name for name in ORDER if row[name]] for row in rows] == [
        ["rsfMRI"] if step % 3 == 0 else ["rsfMRI", "dMRI"] for step in range(6)
    ]
    for row, plain in zip(rows, result["drift"], strict=True):
        assert row == pytest.approx(plain, rel=1e-5)
    return rows


@pytest.mark.parametrize("case", DRIFTING, ids=lambda case: case.name)
def test_logged_drift_equals_copy_and_compare(case: Case, results: Path, tmp_path: Path) -> None:
    ranks = [json.loads((results / f"{case.name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["error"] for result in ranks] == [None, None]
    first, second = map(check_drift, ranks)
    assert first == second
    alone = check_drift(run_case(replace(case, engine="ddp"), output=tmp_path, simulated_world_size=2))
    for row, expected in zip(first, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-2)


def test_sharded_run_resumed_in_an_absence_measures_what_an_unbroken_one_does(results: Path, tmp_path: Path) -> None:
    whole, resumed = (json.loads((results / f"{name}-1.json").read_text())["log"] for name in ("saved", "resumed"))
    keys = ("drift/rsfMRI", "drift/dMRI")
    expected = [[row[key] for key in keys] for row in whole if "loss" in row]
    assert [[row[key] for key in keys] for row in resumed if "loss" in row] == expected
    checkpoint = results / "saved-run" / "checkpoint-2"
    alone = replace(RESUMED, engine="ddp", resume=str(checkpoint))
    row = run_case(alone, output=tmp_path, simulated_world_size=2)["log"][2]
    assert [row[key] for key in keys] == pytest.approx(expected[2], rel=1e-2)


# ---- a loss that is not finite on one rank ----


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_step_is_skipped_on_all_ranks_alike(engine: str, results: Path) -> None:
    def states(name: str) -> list[dict[str, torch.Tensor]]:
        return [load_file(results / f"{name}-{engine}-{rank}.safetensors") for rank in (0, 1)]

    def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    (plain, _), skipped, continued = (states(name) for name in ("one-step", "skip-2", "skip-3"))
    assert all(equal(plain, state) for state in skipped)
    assert equal(*continued)
    assert not any(torch.equal(plain[name], continued[0][name]) for name in plain if name.endswith("/step"))
    for rank in (0, 1):
        result = json.loads((results / f"skip-3-{engine}-{rank}.json").read_text())
        assert result["error"] is None
        assert (result["num_sharded"] > 0) == (engine == "fsdp2")
        rows = result["log"]
        assert [row["step"] for row in rows if "loss" in row] == [1, 3]
        assert [row["step"] for row in rows if "non_finite/skipped" in row] == [2, 3]


def test_all_ranks_name_the_sample_of_one_rank(results: Path) -> None:
    # Batches of two samples in the order (step, micro-batch, rank).
    first, second = (json.loads((results / f"stopped-{rank}.json").read_text())["error"] for rank in (0, 1))
    assert first == second
    assert re.findall(r"    (.*): loss nan", first) == ["sample 10"]
    assert "1 of 8 samples" in first
    # In the case that stops, and in four that skip the step.
    skipped = [line for line in (results / "stderr").read_text().splitlines() if line.endswith("sample 10: loss nan")]
    assert len(skipped) >= 1 + len(SKIPPING)
