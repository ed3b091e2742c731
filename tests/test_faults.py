"""A fault on one rank: every rank says in one message which rank it was and what is wrong with it."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from stopped_runs import exit_codes, output_of, start_ranks, wait_for, write_config

from umbrella_data.synthetic.cohort import DemoCohort, make_demo_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_demo_cohort(tmp_path_factory.mktemp("cohort"), num_train=6, num_test=2, seed=0)


def outputs(folder: Path, *, num_ranks: int = 2) -> list[str]:
    return [(folder / f"output-{rank}").read_text() for rank in range(num_ranks)]


def test_a_bad_scan_on_one_rank_is_named_by_both(cohort: DemoCohort, tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    shutil.copytree(cohort.train_manifest.parent, folder)
    scan = sorted(folder.rglob("*T1w.nii.gz"))[0]
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes())[:1000]))
    bad = DemoCohort(**{**vars(cohort), "train_manifest": folder / cohort.train_manifest.name})
    ranks = start_ranks(["--config", str(write_config(tmp_path / "run", bad))], tmp_path / "log", num_ranks=2)
    assert exit_codes(ranks) == [2, 2], output_of(tmp_path / "log")
    for output in outputs(tmp_path / "log"):
        assert str(scan) in output
        assert "Traceback" not in output
    assert sum("stopped" in output for output in outputs(tmp_path / "log")) == 1


@pytest.mark.parametrize(
    ("number", "timeout", "words"),
    [
        (signal.SIGSTOP, 6, "ddp_timeout: 6 s"),
        pytest.param(signal.SIGKILL, 100, "It was killed", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_answer_is_named(
    number: signal.Signals, timeout: int, words: str, cohort: DemoCohort, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run", cohort, ddp_timeout=timeout)
    ranks = start_ranks(["--config", str(config)], tmp_path / "log", num_ranks=2, moment="step")
    for rank in range(2):
        wait_for(tmp_path / "log" / f"ready-{rank}", alive=ranks)
    os.kill(ranks[1].pid, number)
    (tmp_path / "log" / "sent").touch()
    assert exit_codes(ranks[:1], seconds=40) == [2], output_of(tmp_path / "log")
    ranks[1].kill()
    output = outputs(tmp_path / "log")[0]
    assert re.search(r"rank 1 on \S+ gives no sign of life", output), output
    assert words in output
    assert "Traceback" not in output
