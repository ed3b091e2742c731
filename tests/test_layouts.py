"""The same samples in different layouts over batches, accumulation and ranks, with the norm of the dummy gradient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import scaled
import warm
from engines import Case, run_case
from launching import launch_warm, results_of
from safetensors.torch import load_file

# Eight samples per step, with 2 to 5 supervised tokens and 0 to 3 scans each.
WHOLE = {
    scale: Case(f"8x1-{scale}", "samples", steps=10, batch_size=8, gradient_scale=scale)
    for scale in ("mean", "present")
}
LAYOUTS = [(4, 2), (2, 4), (1, 8)]


def reshaped(case: Case, batch_size: int, accumulation: int, *, name: str = "") -> Case:
    scale = case.gradient_scale
    return replace(
        case, name=name or f"{batch_size}x{accumulation}-{scale}", batch_size=batch_size, accumulation=accumulation
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert [run_case(case, output=folder)["error"] for case in WHOLE.values()] == [None, None]
    return folder


def assert_equal_runs(folder: Path, name: str, *, whole: Path, whole_name: str) -> None:
    weights, expected = load_file(folder / f"{name}-0.safetensors"), load_file(whole / f"{whole_name}-0.safetensors")
    assert max((weights[key] - expected[key]).abs().max().item() for key in expected) < 1e-6
    losses, expected_losses = (
        [row["loss"] for row in json.loads((where / f"{file}-0.json").read_text())["log"] if "loss" in row]
        for where, file in ((folder, name), (whole, whole_name))
    )
    assert len(losses) == 10
    assert losses == pytest.approx(expected_losses, abs=2e-6)


@pytest.mark.parametrize("scale", WHOLE)
@pytest.mark.parametrize(("batch_size", "accumulation"), LAYOUTS)
def test_accumulation_does_not_change_the_result(
    batch_size: int, accumulation: int, scale: str, whole: Path, tmp_path: Path
):
    case = reshaped(WHOLE[scale], batch_size, accumulation)
    assert run_case(case, output=tmp_path)["error"] is None
    assert_equal_runs(tmp_path, case.name, whole=whole, whole_name=WHOLE[scale].name)


RANKS = [
    reshaped(case, batch_size, accumulation, name=f"ranks-{batch_size}x{accumulation}-{scale}")
    for scale, case in WHOLE.items()
    for batch_size, accumulation in ((4, 1), (1, 4))
]
# dMRI is always absent.
NORMS = [
    Case(
        f"norm-{engine}-{dtype}-{'autocast' if bf16 else 'plain'}-{accumulation}",
        "absent",
        steps=2,
        accumulation=accumulation,
        engine=engine,
        dtype=dtype,
        arguments={"bf16": bf16},
    )
    for engine, dtype, bf16, accumulation in [
        ("ddp", "float32", False, 1),
        ("ddp", "float32", False, 8),
        ("ddp", "float32", True, 1),
        ("ddp", "float32", True, 8),
        ("ddp", "bfloat16", False, 8),
        ("fsdp2", "float32", False, 8),
        ("fsdp2", "float32", True, 8),
    ]
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch_warm([*RANKS, *NORMS], folder, num_ranks=2)
    return folder


@pytest.mark.parametrize("case", RANKS, ids=lambda case: case.name)
def test_two_ranks_do_not_change_the_result(case: Case, on_two_ranks: Path, whole: Path) -> None:
    results_of(case, on_two_ranks, world_size=2)
    assert_equal_runs(on_two_ranks, case.name, whole=whole, whole_name=WHOLE[case.gradient_scale].name)


def assert_norm_is_scale(log: list[dict[str, float]], *, dtype: str) -> None:
    norms = [row["grad/[inactive]/vision_tower.dMRI_patch_embed"] for row in log if "loss" in row]
    assert norms == pytest.approx([1e-7, 1e-7], rel=5e-3 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_inactive_norm_on_two_ranks_is_the_scale(case: Case, on_two_ranks: Path) -> None:
    logs, _ = results_of(case, on_two_ranks, world_size=2)
    for log in logs:
        assert (log["num_sharded"] > 0) == (case.engine == "fsdp2")
    assert_norm_is_scale(logs[0]["log"], dtype=case.dtype)


@pytest.mark.parametrize("case", [case for case in NORMS if case.engine == "ddp"], ids=lambda case: case.name)
def test_inactive_norm_in_one_process_is_the_scale(case: Case, tmp_path: Path) -> None:
    result = run_case(case, output=tmp_path)
    assert result["error"] is None
    assert_norm_is_scale(result["log"], dtype=case.dtype)


def test_inactive_norm_with_a_loss_scaler_is_the_scale_after_unscaling(tmp_path: Path) -> None:
    output = tmp_path / "output"
    ranks = warm.start_ranks(scaled.write_norms, tmp_path, outputs=[output, output])
    assert warm.end_together(ranks, seconds=120) == [0, 0], output.read_text()
    for rank in range(2):
        for norms in json.loads((tmp_path / f"scaled-{rank}.json").read_text()).values():
            assert norms["has_scaler"]
            assert (norms["rsfMRI"], norms["dMRI"]) == pytest.approx((1e-7, 1e-7), rel=1e-4)
            assert norms["T1"] > 1e-4
