"""DeepSpeed ZeRO-2 and ZeRO-3 by the shipped accelerate configs: two gloo ranks compared with one process.

DeepSpeed is an extra that `uv sync` does not install: `uv run --with deepspeed pytest -m deepspeed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import warm
from engines import Case, run_case, run_cases
from launching import launch
from safetensors.torch import load_file
from toy import COMPOSED as COMPOSED_MODELS
from toy import ORDER, UNPACKED

import umbrella_train
from umbrella_model import UmbrellaForConditionalGeneration

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

CONFIGS = Path(umbrella_train.__file__).parent / "configs" / "accelerate"
ADAM = {"optim": "adamw_torch", "dummy_loss": {"scale": 0.0}}
CASES = [
    *(Case(schedule, schedule, steps=4) for schedule in ("same", "different", "text", "all")),
    Case("absent", "absent", steps=2, accumulation=8),
    Case("random", "random", steps=8, accumulation=2),
    Case("checkpointed", "random", steps=4, arguments={"gradient_checkpointing": True, "max_grad_norm": 0.5}),
    Case("adam", "random", steps=4, accumulation=2, **ADAM, arguments={"weight_decay": 0.01}),
    Case("lora", "random", steps=4, learn="lora", **ADAM),
    Case("patch-embeds", "random", steps=4, learn="patch_embed_only"),
    Case("packed", "random", steps=4, accumulation=2, packing=True),
    Case("gpt2", "random", steps=2, model="gpt2", learn="lora", packing=True),
]
# Every composed model, in turn with adapters, on packed batches, and with checkpointed activations.
COMPOSED = [
    Case(
        f"{model}-{learn}",
        schedule,
        steps=3,
        accumulation=2,
        model=model,
        learn=learn,
        packing=model not in UNPACKED and learn != "align",
        arguments={"gradient_checkpointing": learn == "full"},
    )
    for model in COMPOSED_MODELS
    for learn, schedule in (("full", "random"), ("lora", "different"), ("align", "text"))
]
BF16 = Case("bf16", "different", steps=2, arguments={"bf16": True})
SAVING = {"save_strategy": "steps", "save_steps": 2}
WHOLE = Case("whole", "random", steps=4, optim="adamw_torch", arguments=SAVING)
DRIFT = Case("drift", "returns", steps=4, optim="adamw_torch")
SUMMED = Case("summed", "different", steps=4, sabotage="summed")
INFINITY = Case("infinity", "absent", sabotage="infinity")
NAN = Case("nan", "different", accumulation=2, sabotage="nan")


def accelerate(stage: int) -> list[str]:
    """Starts two ranks as a user would."""
    config = CONFIGS / f"deepspeed_zero{stage}.yaml"
    return ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The results of all cases at one stage, from one process group."""

    @cache
    def launch_once(stage: int) -> Path:
        folder = tmp_path_factory.mktemp("zero")
        resumed = replace(WHOLE, name="resumed", resume=str(folder / "whole-run" / "checkpoint-2"))
        sabotaged = [SUMMED, INFINITY] if stage == 2 else [INFINITY]
        launch([*CASES, BF16, DRIFT, WHOLE, resumed, *sabotaged], folder, launcher=accelerate(stage), timeout=400)
        return folder

    return launch_once


def log_of(case: Case, folder: Path, *, rank: int = 0) -> dict:
    path = folder / f"{case.name}-{rank}.json"
    assert path.is_file(), f"rank {rank} did not get to {case.name}\n{(folder / 'stderr').read_text()[-3000:]}"
    return json.loads(path.read_text())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_under_zero_equal_one_process(case: Case, stage: int, launched: Callable[[int], Path], tmp_path: Path):
    check_case(case, launched(stage), stage=stage, scratch=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_composed_models_under_zero_equal_one_process(stage: int, tmp_path: Path):
    folder = tmp_path / "ranks"
    tied = replace(WHOLE, model="gpt2")
    resumed = replace(tied, name="resumed", resume=str(folder / "whole-run" / "checkpoint-2"))
    launch([*COMPOSED, tied, resumed], folder, launcher=accelerate(stage), timeout=500)
    for case in COMPOSED:
        check_case(case, folder, stage=stage, scratch=tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(folder / "whole-run" / "checkpoint-2")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    whole, again = (load_file(folder / f"{name}-0.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def check_case(case: Case, folder: Path, *, stage: int, scratch: Path) -> None:
    for rank in range(2):
        log = log_of(case, folder, rank=rank)
        assert log["error"] is None
        assert (log["num_sharded"] == len(log["parameters"])) == (stage == 3)
    alone = replace(case, packing=False)
    assert run_case(alone, output=scratch, simulated_world_size=2)["error"] is None
    weights, reference = (
        load_file(folder / f"{case.name}-0.safetensors"),
        load_file(scratch / f"{case.name}-0.safetensors"),
    )
    # A bias of keys shifts all scores equally: its true gradient is zero, and Adam turns rounding into a step.
    names = [name for name in reference if "/" not in name and not (case.optim != "sgd" and "k_proj.bias" in name)]
    assert set(names) <= set(weights)
    differences = {name: (weights[name] - reference[name]).abs().max().item() for name in names}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < 1e-5, (worst, differences[worst])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [(CASES[1], 1e-4), (CASES[4], 1e-4), (BF16, 5e-3)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_inactive_norm_under_zero_is_the_scale(case, tolerance, stage, launched):
    rows = [row for row in log_of(case, launched(stage))["log"] if "loss" in row]
    inactive = [
        value
        for row in rows
        for key, value in row.items()
        if key.startswith("grad/[inactive]") and not key.endswith("proj")
    ]
    assert inactive
    assert inactive == pytest.approx([1e-7] * len(inactive), rel=tolerance)
    assert max(value for row in rows for key, value in row.items() if key.startswith("grad/[T1]")) > 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_under_zero_is_bit_identical(stage, launched):
    folder = launched(stage)
    steps = [row["step"] for row in log_of(replace(WHOLE, name="resumed"), folder)["log"] if "loss" in row]
    assert steps == [1, 2, 3, 4]
    whole, resumed = (load_file(folder / f"{name}-0.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("stage", [2, 3])
def test_drift_under_zero_equals_one_process_and_is_resumed(stage, launched, tmp_path):
    def drift(result):
        rows = [row for row in result["log"] if "loss" in row]
        return [row[f"drift/{name}"] for row in rows for name in ORDER]

    folder = launched(stage)
    measured, alone = drift(log_of(DRIFT, folder)), drift(run_case(DRIFT, output=tmp_path, simulated_world_size=2))
    assert sum(value > 0 for value in alone) == 6
    assert measured == pytest.approx(alone, rel=1e-2)
    whole, resumed = (drift(log_of(replace(WHOLE, name=name), folder)) for name in ("whole", "resumed"))
    assert sum(value > 0 for value in whole) > 0
    assert resumed == whole


def test_another_order_of_summing_is_detected_under_zero_2(launched, tmp_path):
    folder = launched(2)
    assert log_of(SUMMED, folder)["error"] is None
    run_case(replace(SUMMED, sabotage=None), output=tmp_path, simulated_world_size=2)
    wrong, right = load_file(folder / "summed-0.safetensors"), load_file(tmp_path / "summed-0.safetensors")
    assert max((wrong[name] - right[name]).abs().max().item() for name in right) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dummy_loss": {"absent": "hold"}}, "dummy_loss.absent: hold has no effect under DeepSpeed"),
        ({"on_non_finite": "skip"}, "trainer.on_non_finite: skip is not supported with DeepSpeed"),
    ],
)
def test_settings_without_effect_are_rejected_by_the_trainer(settings, message, tmp_path):
    output, environment = tmp_path / "output", {"ACCELERATE_USE_DEEPSPEED": "true"}
    cases = [Case("rejected", **settings)]
    process = warm.start(run_cases, cases, tmp_path, output=output, environment=environment)
    assert warm.end_together([process], seconds=120) == [1]
    assert f"RunError: {message}" in output.read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_infinity_under_zero_stops_the_run_before_a_step(stage, launched):
    for rank in range(2):
        error = log_of(INFINITY, launched(stage), rank=rank)["error"]
        assert error is not None
        assert "NonFiniteError: step 1: parameter model.vision_tower.dMRI_patch_embed" in error


# The samples are computed again one by one, which needs collectives under ZeRO-3 only.
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_sample_of_a_non_finite_loss_is_named_under_zero(stage, tmp_path):
    launch([NAN], tmp_path, launcher=accelerate(stage), timeout=120)
    for rank in range(2):
        error = log_of(NAN, tmp_path, rank=rank)["error"]
        assert "NonFiniteError: step 2: the loss" in error
        assert re.findall(r"    (.*): loss nan", error) == ["sample 10"]
