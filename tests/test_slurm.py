"""The scripts of examples/slurm on a SLURM of one node, on this machine: arrays merge, and stopped runs are resumed.

Needs Debian's slurm-wlm and root; the options of sbatch are those of the scripts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny_model import MODEL

from umbrella_data.cli import main

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples/slurm"
LOOPBACK = ROOT / "tests/support/loopback_slurm.sh"


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A SLURM controller with one node, for the commands of this process."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0:
        pytest.skip("needs slurmctld and munged (Debian's slurm-wlm), and root")
    # Not in pytest's folder, which munge's user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    ports = {}
    for name in ("SLURMCTLD_PORT", "SLURMD_PORT"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[name] = str(free.getsockname()[1])
    try:
        subprocess.run(["bash", LOOPBACK, "start", folder], check=True, env={**os.environ, **ports}, timeout=60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("UMBRELLA_ENV", sys.prefix)
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
            call("scancel", "--user=root")
    finally:
        subprocess.run(["bash", LOOPBACK, "stop", folder], check=True, timeout=60)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects."""
    folder = tmp_path_factory.mktemp("cohort")
    assert main(["demo", "--out", str(folder), "--num-train", "2", "--num-test", "1"]) == 0
    return folder


def call(*words: str | Path) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def job_field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", call("scontrol", "--oneliner", "show", "job", job))
    assert found
    return found[1]


def wait_until(is_done: Callable[[], bool], *, what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end, f"{what} did not happen; {call('squeue')}"
        time.sleep(0.1)


def wait_for(job: str, state: str, folder: Path) -> None:
    def is_done() -> bool:
        now = job_field(job, "JobState")
        assert now == state or now in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), now + "\n".join(
            path.read_text()[-3000:] for path in sorted(folder.glob("umbrella-*.out"))
        )
        return now == state

    wait_until(is_done, what=f"state {state} of job {job}")


def start_again(job: str) -> None:
    """Start a job that is queued again now, not after two minutes."""
    # The controller would take the end of the first script for that of the second one.
    wait_until(lambda: f"slurmstepd: [{job}." not in call("ps", "-ewwo", "args"), what="the end of the first script")
    time.sleep(10)
    call("scontrol", "update", f"JobId={job}", "StartTime=now")


def submit_array(words: list[str | Path], num_shards: int) -> list[str]:
    """The numbers of the jobs: the array, and the merge if there is one."""
    printed = call("env", f"NUM_SHARDS={num_shards}", "bash", SCRIPTS / "data_array.sh", *words)
    return re.findall(r"^(?:array|merge): (\d+)", printed, re.MULTILINE)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_arrays_write_what_one_job_writes(slurm, cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from_bids = ["from-bids", str(cohort), "--modality", "T1", "--test-fraction", "0.5"]
    assert main([*from_bids, "--out", "one", "--workers", "1"]) == 0
    jobs = submit_array([*from_bids, "--out", "many"], 2)
    assert len(jobs) == 2
    wait_for(jobs[1], "COMPLETED", tmp_path)
    assert content(tmp_path / "many") == content(tmp_path / "one")

    check = ["check", str(cohort / "train.jsonl"), str(cohort / "test.jsonl"), "--modality", "T1", "--names"]
    assert main([*check, "--out", "one", "--workers", "1"]) == 0
    cache = ["cache", *check[1:3], "--modality", "T1", "--size", "T1=8,8,8", "--cache-dir"]
    assert main([*cache, "cache-of-one", "--workers", "1"]) == 0
    # More shards than subjects.
    jobs = [*submit_array([*check, "--out", "many"], 4), *submit_array([*cache, "cache-of-many"], 2)]
    assert len(jobs) == 3
    for job in jobs[1:]:
        wait_for(job, "COMPLETED", tmp_path)
    assert (tmp_path / "many/check.json").read_bytes() == (tmp_path / "one/check.json").read_bytes()
    volumes = content(tmp_path / "cache-of-one/volumes")
    assert len(volumes) == 3
    wait_until(lambda: content(tmp_path / "cache-of-many/volumes") == volumes, what="a full cache", seconds=60)


@pytest.mark.parametrize("command", ["cache", "check"])
def test_time_limit_of_a_shard_requeues_the_cache_alone(slurm, cohort, tmp_path, command):
    words = [command, str(cohort / "train.jsonl"), "--modality", "T1"]
    words += ["--size", "T1=8,8,8", "--cache-dir", "cache"] if command == "cache" else ["--out", "out"]
    script = SCRIPTS / "data_array.sh"
    job = call("sbatch", "--parsable", f"--chdir={tmp_path}", "--array=1-1", script, *words).strip()
    # The script has started the command, which takes seconds to import its libraries.
    running = f"umbrella-data {command} {cohort}"
    wait_until(lambda: running in call("ps", "-ewwo", "args"), what="the command")
    call("scancel", "--batch", "--signal=USR1", job)
    wait_for(job, "PENDING" if command == "cache" else "FAILED", tmp_path)
    if command == "cache":
        start_again(job)
        wait_for(job, "COMPLETED", tmp_path)
        assert len(content(tmp_path / "cache/volumes")) == 2
    else:
        (output,) = tmp_path.glob("umbrella-data-*.out")
        assert "--shard 1/1" in output.read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def config(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 steps with dropout: ten seconds on an idle machine, enough to be stopped in between."""
    folder = tmp_path_factory.mktemp("config")
    content = {
        "model": MODEL,
        "data": {"train": [{"manifest": str(cohort / "train.jsonl")}], "cache_dir": str(folder / "cache")},
        "trainer": {
            "max_steps": 120,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 1000,
            "use_cpu": True,
        },
        "report": {"enabled": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def unbroken(slurm: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that is not stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    command = [Path(sys.prefix) / "bin/umbrella-train", "--config", config, "--output-dir", folder, "--name", "run"]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return (folder / "run/model/model.safetensors").read_bytes()


def start(script: str, config: Path, folder: Path, *options: str) -> str:
    """Submit a training script; returns the job once it has done five steps."""
    variables = [f"CONFIG={config}", "RUN=runs/run"]
    job = call("env", *variables, "sbatch", "--parsable", f"--chdir={folder}", *options, SCRIPTS / script).strip()
    metrics = folder / "runs/run/metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 5, what="five steps")
    return job


ONE_NODE = ("train_one_node.sh",)
TWO_RANKS = ("train_one_node.sh", "--gpus-per-node=2")
# The script asks for two nodes with four GPUs.
NODES = ("train_nodes.sh", "--nodes=1", "--gpus-per-node=1")


@pytest.mark.parametrize("stop", ["requeue", "time_limit"])
@pytest.mark.parametrize("script", [ONE_NODE, NODES], ids=["one_node", "nodes"])
def test_requeued_run_ends_with_the_weights_of_an_unbroken_one(slurm, script, stop, config, unbroken, tmp_path):
    job = start(script[0], config, tmp_path, *script[1:])
    if stop == "requeue":
        call("scontrol", "requeue", job)
    else:
        # What --signal=B:USR1@... does before the time limit.
        call("scancel", "--batch", "--signal=USR1", job)
    wait_for(job, "PENDING", tmp_path)
    assert not (tmp_path / "runs/run/FINISHED").exists()
    assert list((tmp_path / "runs/run").glob("checkpoint-*"))
    start_again(job)
    wait_for(job, "COMPLETED", tmp_path)
    assert job_field(job, "Restarts") == "1"
    assert (tmp_path / "runs/run/model/model.safetensors").read_bytes() == unbroken
    steps = [json.loads(line).get("loss") for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in steps if loss is not None]) == 120
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def test_ranks_of_torchrun_save_at_the_time_limit(slurm, config, tmp_path):
    job = start(TWO_RANKS[0], config, tmp_path, *TWO_RANKS[1:])
    call("scancel", "--batch", "--signal=USR1", job)
    wait_for(job, "PENDING", tmp_path)
    (checkpoint,) = (tmp_path / "runs/run").glob("checkpoint-*")
    assert 5 <= int(checkpoint.name.partition("-")[2]) < 120
    assert (checkpoint / "integrity.json").is_file()
    call("scancel", job)
    wait_until(lambda: not call("squeue", "--noheader"), what="an empty queue")


@pytest.mark.parametrize("script", [ONE_NODE, NODES], ids=["one_node", "nodes"])
def test_cancelled_job_is_not_queued_again(slurm, script, config, tmp_path):
    job = start(script[0], config, tmp_path, *script[1:])
    call("scancel", job)
    wait_until(lambda: job_field(job, "JobState") == "CANCELLED", what="the end of the job")
    # The script has ended, too, and could have queued the job again.
    wait_until(
        lambda: job_field(job, "EndTime") != "Unknown" and not call("squeue", "--noheader"), what="an empty queue"
    )
    assert job_field(job, "JobState") == "CANCELLED"
    assert (tmp_path / "runs/run/REQUEUE").is_file()
