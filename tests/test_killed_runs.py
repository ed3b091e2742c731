"""Runs that are killed at any moment, and started again by the same command; long runs."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stopped_runs import exit_codes, output_of, start_ranks, wait_for, write_config

from umbrella_data.synthetic.cohort import DemoCohort, make_demo_cohort
from umbrella_train.checkpoint.integrity import newest_valid_checkpoint
from umbrella_train.config import load_config
from umbrella_train.run.training import train
from umbrella_train.trainer.trainer import UmbrellaTrainer

SETTINGS = {"max_steps": 20, "save_steps": 1, "save_total_limit": 2}
# Where a run is killed, in its lives one after the other; None: after a random number of lines of metrics.jsonl.
IN_CI = ("step", "in a save", "after a save", None, "save")
ALL = [random.Random(seed).sample(["in a save", "after a save", "step", None, None], 5) for seed in range(4)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_train=6, num_test=2, seed=0)


@pytest.fixture(scope="module")
def unbroken(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    words = ["--config", str(write_config(folder, cohort, **SETTINGS))]
    assert exit_codes(start_ranks(words, folder / "log")) == [0], output_of(folder / "log")
    return folder / "runs" / "run"


def rows_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []


def results_of(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in rows_of(run)]
    ends = ("runtime", "per_second", "train_loss", "total_flos")
    return (run / "model" / "model.safetensors").read_bytes(), [
        {key: value for key, value in row.items() if not key.endswith(ends)} for row in rows
    ]


@pytest.mark.parametrize("moments", [IN_CI, *(pytest.param(each, marks=pytest.mark.slow) for each in ALL)])
def test_a_run_that_is_killed_five_times_equals_an_unbroken_one(
    moments: list[str | None], cohort: DemoCohort, unbroken: Path, tmp_path: Path
) -> None:
    words = ["--config", str(write_config(tmp_path, cohort, **SETTINGS)), "--resume", "auto"]
    run, generator, num_killed = tmp_path / "runs" / "run", random.Random(str(moments)), 0
    for life, moment in enumerate(moments):
        log = tmp_path / str(life)
        (process,) = start_ranks(words, log, moment=moment)
        if moment is None:
            num_rows = len(rows_of(run)) + generator.randint(1, 4)
            while process.is_alive() and len(rows_of(run)) < num_rows:
                time.sleep(0.005)
        else:
            wait_for(log / "ready-0", alive=[process])
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        num_killed += exit_codes([process]) == [-9]
        if run.exists() and any(run.glob("checkpoint-*/integrity.json")):
            newest_valid_checkpoint(run)  # raises without one
    assert num_killed >= sum(moment is not None for moment in moments)
    assert exit_codes(start_ranks(words, tmp_path / "last")) == [0], output_of(tmp_path / "last")
    assert results_of(run) == results_of(unbroken)


@pytest.mark.slow
def test_of_two_commands_at_once_one_trains(cohort: DemoCohort, unbroken: Path, tmp_path: Path) -> None:
    """The first holds in a step until the second has ended."""
    words = ["--config", str(write_config(tmp_path, cohort, **SETTINGS)), "--resume", "auto"]
    first = start_ranks(words, tmp_path / "first", moment="step")
    wait_for(tmp_path / "first" / "ready-0", alive=first)
    assert exit_codes(start_ranks(words, tmp_path / "second")) == [2]
    assert str(first[0].pid) in output_of(tmp_path / "second")
    (tmp_path / "first" / "sent").touch()
    assert exit_codes(first) == [0]
    assert results_of(tmp_path / "runs" / "run") == results_of(unbroken)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_and_open_files_do_not_grow_with_the_steps(
    cohort: DemoCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """10,000 steps; the first 2,000 are not counted."""
    step, process = UmbrellaTrainer.training_step, psutil.Process()
    seen: list[tuple[int, float, int]] = []

    def measured(self: UmbrellaTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step % 500 == 499:
            seen.append((self.state.global_step, process.memory_info().rss / 1e6, process.num_fds()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(UmbrellaTrainer, "training_step", measured)
    settings = {"max_steps": 10_000, "save_steps": 1000, "save_total_limit": 2, "eval_steps": 1000, "logging_steps": 10}
    assert train(load_config(write_config(tmp_path, cohort, **settings), to_run=True)) is not None
    late = [row for row in seen if row[0] > 2000]
    mean_step, mean_memory = (sum(row[index] for row in late) / len(late) for index in (0, 1))
    slope = sum((row[0] - mean_step) * (row[1] - mean_memory) for row in late) / sum(
        (row[0] - mean_step) ** 2 for row in late
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{1000 * slope:.3f} MB per 1,000 steps, open files {sorted({row[2] for row in late})}\n")
    assert 1000 * slope < 2, seen
    # Some more while a checkpoint is hashed.
    assert max(row[2] for row in late) - min(row[2] for row in late) <= 3, seen
