"""The engine matrix of `test_engines.py` on GPUs with NCCL: `uv run pytest -m gpu`, two ranks if there are two GPUs.

On one GPU it has one rank, which still passes through NCCL, DDP's reducer, FSDP2's sharding and the loss scaler.
`-k` runs only the selected cases; `GPU_CASES_SECONDS` ends the ranks after that time, and keeps the cases done by then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_matrix import TRIALS
from engines import Case, run_case
from launching import launch, results_of, torchrun
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("GPU_CASES_SECONDS", "1000"))
NUM_RANKS = max(1, min(2, torch.cuda.device_count()))
# Other shapes use other kernels, which sum in another order.
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "half": 5e-3}


def on_gpu(case: Case, **arguments: Any) -> Case:
    settings = {**case.arguments, **arguments, "use_cpu": False}
    # The kernel for packed conversations supports half precision only.
    return replace(case, arguments=settings, packing=case.packing and bool(settings.get("bf16")))


CASES = [on_gpu(case) for case, _ in TRIALS]
CASES += [
    on_gpu(Case("ddp-fp16", "random", steps=4, accumulation=2), fp16=True),
    on_gpu(Case("ddp-compiled", "random", steps=4, compiler="inductor")),
    on_gpu(Case("fsdp2-compiled", "random", steps=4, compiler="inductor", engine="fsdp2")),
]
SHARDED = next(case for case in CASES if case.engine == "fsdp2")


def tolerance(case: Case) -> float:
    is_half = case.arguments.get("bf16") or case.arguments.get("fp16")
    return TOLERANCE["float64" if case.dtype == "float64" else "half" if is_half else "float32"]


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The results of the cases that tests were selected for, from one process group."""
    folder = tmp_path_factory.mktemp("gpus")
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {each.params["case"].name for each in parameters if each is not None and "case" in each.params}
    cases = [case for case in CASES if case.name in selected or case is SHARDED]
    errors = launch(cases, folder, launcher=torchrun(NUM_RANKS), timeout=SECONDS)
    assert "unused" not in errors
    return lambda: folder


def test_the_process_group_is_nccl(launched: Callable[[], Path]) -> None:
    logs, _ = results_of(SHARDED, launched(), world_size=NUM_RANKS)
    assert {log["device"] for log in logs} == {f"cuda:{rank}" for rank in range(NUM_RANKS)}
    assert {log["backend"] for log in logs} == {"nccl"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_on_gpus_equal_one_process(case: Case, launched: Callable[[], Path], tmp_path: Path) -> None:
    logs, weights = results_of(case, launched(), world_size=NUM_RANKS)
    for log in logs:
        assert (log["num_sharded"] == len(log["parameters"])) == (case.engine == "fsdp2")
        assert log["has_scaler"] == bool(case.arguments.get("fp16"))
        assert all(math.isfinite(line["loss"]) for line in log["log"] if "loss" in line)
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    reference = replace(case, engine="ddp", compiler=None, packing=False)
    assert run_case(reference, output=tmp_path, simulated_world_size=NUM_RANKS)["error"] is None
    expected = load_file(tmp_path / f"{case.name}-0.safetensors")
    differences = {name: (weights[0][name] - expected[name]).abs().max().item() for name in expected}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < tolerance(case), (worst, differences[worst])


def test_inactive_norm_on_a_gpu_is_the_scale_with_a_loss_scaler(tmp_path: Path) -> None:
    case = on_gpu(Case("scaled", "absent", steps=2, accumulation=8), fp16=True)
    launch([case], tmp_path, launcher=torchrun(NUM_RANKS), timeout=SECONDS)
    rows = [row for row in json.loads((tmp_path / "scaled-0.json").read_text())["log"] if "loss" in row]
    key = "grad/[inactive]/vision_tower.dMRI_patch_embed"
    assert [row[key] for row in rows] == pytest.approx([1e-7] * len(rows), rel=1e-4)
