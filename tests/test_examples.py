"""The examples agree with the packages, and shell scripts are valid."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("slurm/*.sh"))
CONTAINERS = (EXAMPLES / "containers/Dockerfile", EXAMPLES / "containers/umbrella.def")


def test_there_is_a_script_for_each_row_of_the_readme():
    rows = re.findall(r"^\| \[(\S+\.sh)\]", (EXAMPLES / "slurm/README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [path.name for path in SCRIPTS]
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_ask_for_a_requeue_and_a_signal(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    text = script.read_text()
    options = re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE)
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(re.fullmatch(r"--signal=B:USR1@\d+", option) for option in options)
    # sbatch reads options up to the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


@pytest.mark.parametrize("name", ["train_one_node.sh", "train_nodes.sh"])
@pytest.mark.parametrize("fold", [None, "3"])
def test_a_stopped_fold_requeues_its_own_job(tmp_path, name, fold):
    # Job 7 of the array 7: without the number of the fold, scontrol would requeue the jobs of all folds.
    mark = "my/REQUEUE" if fold is None else f"my/fold-{fold}/REQUEUE"
    commands = {
        "umbrella-train": f'echo "$@" >words; mkdir -p {Path(mark).parent}; touch {mark}; exit 138',
        "srun": f'echo "$@" >words; mkdir -p {Path(mark).parent}; touch {mark}; exit 1',
        "scontrol": '[[ $1 == show ]] && echo node || echo "$@" >requeued',
    }
    (tmp_path / "bin").mkdir()
    for command, body in commands.items():
        path = tmp_path / "bin" / command
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1"}
    array = {} if fold is None else {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": fold}
    environment = {"PATH": os.environ["PATH"], "UMBRELLA_ENV": str(tmp_path), "CONFIG": "my.yaml", "RUN": "my"}
    words = ["bash", EXAMPLES / "slurm" / name, "--folds", "5"]
    subprocess.run(words, check=False, cwd=tmp_path, env=environment | job | array)
    assert (tmp_path / "requeued").read_text() == f"requeue {'7' if fold is None else '7_3'}\n"
    assert ("--fold 3" in (tmp_path / "words").read_text()) == (fold is not None)


def test_torchrun_has_less_time_to_end_than_the_job():
    for script in SCRIPTS:
        text = script.read_text()
        for timeout in re.findall(r"--shutdown-timeout (\d+)", text):
            (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)", text, re.MULTILINE)
            assert int(timeout) < int(seconds)


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda path: path.name)
def test_containers_install_the_three_packages_and_copy_nothing_else(file):
    text = file.read_text()
    installed = re.findall(r"\./packages/(umbrella-\w+)(?:\[([\w,]+)\])?", text)
    assert installed == [
        ("umbrella-data", "dmri,fast,index,preview"),
        ("umbrella-model", "lora"),
        ("umbrella-train", ""),
    ]
    for package, extras in installed:
        project = (EXAMPLES.parent / "packages" / package / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(",") if extra)
    if file.suffix == ".def":
        copied = re.findall(r"^    (\S+) /opt/umbrella/", text, re.MULTILINE)
    else:
        copied = re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE)
    assert copied == ["pyproject.toml", "packages"]
    # A version that does not move.
    (image,) = re.findall(r"^(?:FROM|From:) (python:\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", image)


def test_docker_image_does_not_run_as_root():
    users = re.findall(r"^USER (\S+)", CONTAINERS[0].read_text(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
