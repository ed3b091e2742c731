"""A run whose process group receives a signal at any moment saves, and resumes to the weights of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pairwise import all_combinations, pairwise
from stopped_runs import MOMENTS, exit_codes, output_of, start_ranks, wait_for, write_config

from umbrella_data.synthetic.cohort import DemoCohort, make_demo_cohort

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
OPTIONS = {"moment": MOMENTS, "workers": (0, 2), "ranks": (1, 2)}
# All pairs of moment, workers and ranks, with the signals in turn; the whole table is slow.
PAIRS = [{"number": SIGNALS[index % 5], **row} for index, row in enumerate(pairwise(OPTIONS))]
TABLE = [row for row in all_combinations({"number": SIGNALS, **OPTIONS}) if row not in PAIRS]

# For a signal at any moment of a command that is not held.
LONG: dict[str, Any] = {"max_steps": 150, "eval_steps": None}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_train=6, num_test=2, seed=0)


def train_unbroken(cohort: DemoCohort, folder: Path, num_ranks: int, **trainer: Any) -> Path:
    words = ["--config", str(write_config(folder, cohort, **trainer))]
    assert exit_codes(start_ranks(words, folder / "log", num_ranks=num_ranks)) == [0] * num_ranks
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def unbroken(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function that trains without a break on a number of ranks; the same folder for every test."""
    return cache(lambda num_ranks: train_unbroken(cohort, tmp_path_factory.mktemp("unbroken"), num_ranks))


@pytest.fixture(scope="module")
def long_unbroken(cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """As `unbroken`, with more steps and no evaluation between them."""
    return cache(lambda num_ranks: train_unbroken(cohort, tmp_path_factory.mktemp("long"), num_ranks, **LONG))


def results_of(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Weights, and all rows of metrics.jsonl but those of runtimes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / "model" / "model.safetensors").read_bytes(), [without_times(row) for row in rows]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    ends = ("runtime", "per_second", "train_loss", "total_flos")
    return {key: value for key, value in row.items() if not key.endswith(ends)}


def check(row: dict[str, Any], cohort: DemoCohort, unbroken: Callable[[int], Path], folder: Path) -> None:
    number, ranks = row["number"], row["ranks"]
    words = ["--config", str(write_config(folder, cohort, num_workers=row["workers"])), "--resume", "auto"]
    # In a save means in the last one: there is none before.
    processes = start_ranks(words, folder / "stopped", num_ranks=ranks, moment=row["moment"])
    for rank in range(ranks):
        wait_for(folder / "stopped" / f"ready-{rank}", alive=processes)
    os.killpg(processes[0].pid, number)
    (folder / "stopped" / "sent").touch()
    codes = exit_codes(processes)
    run = folder / "runs" / "run"
    is_done = row["moment"] == "save"  # the signal arrived in the last step: all steps are done
    assert codes == [128 + number] * ranks, output_of(folder / "stopped")
    if row["moment"] == "before":
        assert "nothing to save" in output_of(folder / "stopped")
        assert not run.exists()
    else:
        assert len(list(run.glob("checkpoint-*"))) == 1
        assert (run / "REQUEUE").exists() == (number != signal.SIGINT)
        assert "train_runtime" not in (run / "metrics.jsonl").read_text() or is_done
    assert exit_codes(start_ranks(words, folder / "resumed", num_ranks=ranks)) == [0] * ranks, output_of(
        folder / "resumed"
    )
    assert results_of(run) == results_of(unbroken(ranks))
    assert not (run / "REQUEUE").exists()
    # A third start finds nothing to do.
    modified = (run / "metrics.jsonl").stat().st_mtime_ns
    assert exit_codes(start_ranks(words, folder / "again", num_ranks=ranks)) == [0] * ranks
    assert (run / "metrics.jsonl").stat().st_mtime_ns == modified


def name_of(row: dict[str, Any]) -> str:
    return f"{row['number'].name}-{row['moment']}-{row['workers']}-workers-{row['ranks']}-ranks"


@pytest.mark.parametrize("row", PAIRS, ids=name_of)
def test_signal_to_the_process_group(
    row: dict[str, Any], cohort: DemoCohort, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    check(row, cohort, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=name_of)
def test_signal_to_the_process_group_in_all_combinations(
    row: dict[str, Any], cohort: DemoCohort, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    check(row, cohort, unbroken, tmp_path)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = [
    pytest.param(signal.SIGTERM, 2, [], id="term"),
    # These import everything again: too long for two cores in each run of the tests.
    pytest.param(signal.SIGHUP, 0, [], id="hup", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 2, TORCHRUN, id="torchrun", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "workers", "launcher"), COMMANDS)
def test_signal_to_the_process_group_of_a_command(
    number: int,
    workers: int,
    launcher: list[str],
    cohort: DemoCohort,
    long_unbroken: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """In CI one command receives SIGTERM; forked processes receive the other signals, see `PAIRS`."""
    num_ranks = 2 if launcher else 1
    words = ["--config", str(write_config(tmp_path, cohort, num_workers=workers, **LONG)), "--resume", "auto"]
    command = [sys.executable, *launcher, "-m", "umbrella_train", *words]
    run = tmp_path / "runs" / "run"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        wait_for(run / "metrics.jsonl")
        os.killpg(process.pid, number)
        code = process.wait(90)
    # torchrun has an exit code of its own.
    assert code == (1 if launcher else 128 + number), (tmp_path / "output").read_text()
    (checkpoint,) = run.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 150
    assert (run / "REQUEUE").exists()
    assert exit_codes(start_ranks(words, tmp_path / "resumed", num_ranks=num_ranks)) == [0] * num_ranks
    assert results_of(run) == results_of(long_unbroken(num_ranks))
