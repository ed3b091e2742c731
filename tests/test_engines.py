"""Every engine, policy and mixture against one process: equal weights, no hang, no warning, on 2 and 3 gloo ranks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_matrix import COMPOSED, EVERY, TRIALS
from engines import Case, build_case_model, run_case
from launching import launch, launch_warm, results_of, torchrun
from safetensors.torch import load_file
from torch import Tensor

from umbrella_model import UmbrellaForConditionalGeneration

# Captured as a whole and run by autograd: the graph changes of a compiler, without its minutes.
COMPILED = Case("compiled", "random", steps=4, compiler="aot_eager")
LONG = [Case(f"{engine}-random-200", "random", steps=200, engine=engine) for engine in ("ddp", "fsdp2")]


TOLERANCE = {
    ("ddp", "float32"): 1e-6,
    ("fsdp2", "float32"): 1e-5,
    ("ddp", "float64"): 1e-10,
    ("fsdp2", "float64"): 1e-10,
}


def check_case(case: Case, folder: Path, *, world_size: int, scratch: Path) -> None:
    logs, weights = results_of(case, folder, world_size=world_size)
    for log in logs:
        assert (log["num_sharded"] == len(log["parameters"])) == (case.engine == "fsdp2")
        assert not [words for words in log["warnings"] if "unused" in words]
        assert all(math.isfinite(line["loss"]) for line in log["log"] if "loss" in line)
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    # One process, one step after the other, padded: packed cases are compared with padded ones.
    alone = replace(case, engine="ddp", packing=False)
    assert run_case(alone, output=scratch, simulated_world_size=world_size)["error"] is None
    reference = load_file(scratch / f"{case.name}-0.safetensors")
    if case.arguments.get("bf16"):
        assert_moved_alike(case, weights[0], reference)
        return
    differences = {name: (weights[0][name] - reference[name]).abs().max().item() for name in reference}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < TOLERANCE[case.engine, case.dtype], (worst, differences[worst])


def assert_moved_alike(case: Case, weights: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Under autocast, one process and several ranks round differently: the change of each tensor is compared."""
    start = build_case_model(case).state_dict()
    moved = {name: (reference[name] - start[name]).norm().item() for name in start if name in reference}
    assert moved["model.vision_tower.T1_patch_embed.proj.weight"] > 1e-4
    for name, distance in moved.items():
        # A bias of keys shifts all scores equally: its true gradient is zero, and the computed one is rounding.
        if "k_proj.bias" not in name:
            assert (weights[name] - reference[name]).norm().item() <= 0.05 * distance + 1e-9, (name, distance)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The results of all cases of one number of ranks, from one process group."""

    @cache
    def launch_once(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        errors = launch_warm([case for case, ranks in TRIALS if ranks == world_size], folder, num_ranks=world_size)
        assert "unused" not in errors
        return folder

    return launch_once


@pytest.mark.parametrize(("case", "world_size"), TRIALS, ids=lambda value: getattr(value, "name", f"{value}-ranks"))
def test_ranks_equal_one_process(case: Case, world_size: int, launched: Callable[[int], Path], tmp_path: Path) -> None:
    folder = launched(world_size)
    check_case(case, folder, world_size=world_size, scratch=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_every_combination_equals_one_process(engine: str, world_size: int, tmp_path: Path) -> None:
    # Some are also among the pairs.
    every = [*(case for case, _ in TRIALS), *EVERY, *LONG]
    check_cases({case.name: case for case in every if case.engine == engine}, world_size=world_size, scratch=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_composed_models_equal_one_process(engine: str, world_size: int, tmp_path: Path) -> None:
    check_cases(
        {case.name: case for case in COMPOSED if case.engine == engine}, world_size=world_size, scratch=tmp_path
    )


def check_cases(named: dict[str, Case], *, world_size: int, scratch: Path) -> None:
    cases = list(named.values())
    launch_warm(cases, scratch / "ranks", num_ranks=world_size, timeout=3000)
    failed = {}
    for case in cases:
        try:
            check_case(case, scratch / "ranks", world_size=world_size, scratch=scratch)
        except AssertionError as error:
            failed[case.name] = str(error)[:300]
    assert not failed, f"{len(failed)} of {len(cases)} cases"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_compiled_layers_equal_one_process_that_does_not_compile(engine: str, packing: bool, tmp_path: Path) -> None:
    case = replace(COMPILED, name=f"{engine}-compiled", engine=engine, packing=packing)
    launch_warm([case], tmp_path / "ranks", num_ranks=2)
    check_case(replace(case, compiler=None), tmp_path / "ranks", world_size=2, scratch=tmp_path)


# ---- absent: hold ----


@pytest.mark.parametrize(
    "steps", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=lambda steps: f"{steps}"
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_hold_does_not_change_an_absent_modality(world_size: int, steps: int, tmp_path: Path) -> None:
    def case(steps: int, absent: str) -> Case:
        return Case(
            f"{absent}-{steps}",
            "vanishes",
            steps=steps,
            optim="adamw_torch_fused",
            dummy_loss={"absent": absent},
            parity_every=20,
            arguments={"weight_decay": 0.1, "logging_steps": 20},
        )

    cases = [case(1, "hold"), case(steps, "hold"), case(steps, "update")]
    if world_size == 1:
        assert [run_case(each, output=tmp_path)["error"] for each in cases] == [None] * 3
    else:
        launch_warm(cases, tmp_path, num_ranks=world_size, timeout=1500)
    last = world_size - 1
    first, held, updated = (load_file(tmp_path / f"{each.name}-{last}.safetensors") for each in cases)
    followed = [name for name in first if "dMRI_patch_embed" in name]
    assert {"exp_avg", "exp_avg_sq"} <= {name.rpartition("/")[2] for name in followed}
    assert all(torch.equal(first[name], held[name]) for name in followed)
    assert not all(torch.equal(first[name], held[name]) for name in first if "T1_patch_embed" in name)
    assert not any(torch.equal(first[name], updated[name]) for name in followed)


# ---- sharded checkpoints ----


# A composed model with tied embeddings: a checkpoint has them once.
@pytest.mark.parametrize("model", [None, "gpt2"])
def test_sharded_resume_is_bit_identical_also_on_another_number_of_ranks(model: str | None, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
    # dMRI is never stepped: checkpoints do not have its moments.
    whole = Case(
        "whole",
        "absent",
        steps=4,
        optim="adamw_torch_fused",
        dummy_loss={"absent": "hold"},
        engine="fsdp2",
        model=model,
        arguments=saving,
    )
    checkpoint = tmp_path / "whole-run" / "checkpoint-2"
    launch_warm([whole, replace(whole, name="resumed", resume=str(checkpoint))], tmp_path, num_ranks=2)
    _, (expected, _) = results_of(whole, tmp_path, world_size=2)
    logs, (resumed, _) = results_of(replace(whole, name="resumed"), tmp_path, world_size=2)
    assert [line["step"] for line in logs[0]["log"] if "loss" in line] == [1, 2, 3, 4]
    assert {name: tensor.tolist() for name, tensor in expected.items()} == {
        name: tensor.tolist() for name, tensor in resumed.items()
    }
    assert not [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".distcp")]
    loaded = UmbrellaForConditionalGeneration.from_pretrained(checkpoint)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (model is not None)
    alone = replace(whole, name="alone", engine="ddp", resume=str(checkpoint))
    assert run_case(alone, output=tmp_path, simulated_world_size=2)["error"] is None
    plain = load_file(tmp_path / "alone-0.safetensors")
    assert max((plain[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


# ---- each check detects a broken rule ----

SABOTAGED = {
    "around": Case("around", "random", sabotage="around"),
    "infinity": Case("infinity", "absent", sabotage="infinity"),
    "window": Case("window", "random", accumulation=2, dummy_loss={"absent": "hold"}, sabotage="window"),
    # Last: if one sharded rank fails, all are terminated.
    "outside": Case("outside", "different", engine="fsdp2", sabotage="outside"),
}
MESSAGES = {
    "outside": "mixed torch.Tensor and DTensor",
    # The first of all parameters is named.
    "around": "RankParityError: step 1: the ranks have different values of .* the first is "
    "model.vision_tower.rsfMRI_patch_embed.position_embedding",
    "infinity": "NonFiniteError: step 1: parameter model.vision_tower.dMRI_patch_embed",
}


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sabotaged")
    launch(list(SABOTAGED.values()), folder, launcher=torchrun(2))
    return folder


@pytest.mark.parametrize("name", MESSAGES)
def test_broken_rule_stops_the_run_on_every_rank(name: str, sabotaged: Path) -> None:
    for rank in range(2):
        error = json.loads((sabotaged / f"{name}-{rank}.json").read_text())["error"]
        assert error is not None
        assert re.search(MESSAGES[name], error)


def test_no_step_is_taken_with_an_infinite_parameter(sabotaged: Path, tmp_path: Path) -> None:
    start = Case("start", "absent", steps=1, sabotage="infinity", arguments={"learning_rate": 0.0})
    run_case(start, output=tmp_path)
    before, after = load_file(tmp_path / "start-0.safetensors"), load_file(sabotaged / "infinity-0.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_hold_by_the_last_batch_instead_of_the_window_is_detected(sabotaged: Path, tmp_path: Path) -> None:
    case = SABOTAGED["window"]
    results_of(case, sabotaged, world_size=2)
    run_case(replace(case, sabotage=None), output=tmp_path, simulated_world_size=2)
    right, wrong = load_file(tmp_path / "window-0.safetensors"), load_file(sabotaged / "window-0.safetensors")
    assert max((right[name] - wrong[name]).abs().max().item() for name in right) > 1e-5


@pytest.mark.slow
def test_another_call_order_on_one_rank_is_detected(tmp_path: Path) -> None:
    healthy = Case("healthy", "different", engine="fsdp2", parity_every=0)
    broken = replace(healthy, name="order", sabotage="order")
    errors = launch_warm([healthy, broken], tmp_path, num_ranks=2, timeout=120)
    check_case(healthy, tmp_path, world_size=2, scratch=tmp_path)
    if all((tmp_path / f"order-{rank}.safetensors").is_file() for rank in range(2)):
        wrong, right = load_file(tmp_path / "order-0.safetensors"), load_file(tmp_path / "healthy-0.safetensors")
        assert max((wrong[name] - right[name]).abs().max().item() for name in right) > 1e-3
    else:
        # The sizes of two patch embeds differ: gloo sees it, or the ranks wait for each other.
        assert "Received data size doesn't match" in errors or not (tmp_path / "order-0.json").is_file()
