"""The commands give the same results without the functions that macOS or other systems lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import MODEL

# Python imports it in every process, also in those that it starts.
WITHOUT = """
import builtins, os
for name in ("sched_getaffinity", "memfd_create", "posix_fallocate", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)

# Only for these packages: torch itself needs them.
def import_with_gaps(name, *others, original=builtins.__import__, **named):
    if name in ("fcntl", "resource") and others[0]["__name__"].startswith("umbrella"):
        raise ImportError(name)
    return original(name, *others, **named)

builtins.__import__ = import_with_gaps
"""
RUN = """
import multiprocessing, os, sys
from umbrella_data.cli import main
from umbrella_train.cli import train_command

if __name__ == "__main__":
    print(hasattr(os, "memfd_create"))
    multiprocessing.set_start_method(sys.argv[1])
    assert main(["demo", "--out", "cohort", "--num-train", "2", "--num-test", "1"]) == 0
    manifests = ["cohort/train.jsonl", "cohort/test.jsonl"]
    assert main(["check", *manifests, "--out", "check", "--names", *sys.argv[2:]]) == 0
    assert main(["cache", "--config", "run.yaml", "--max-gb", "1", "--workers", "1"]) == 0
    train_command(["--config", "run.yaml"])
"""
CONFIG: dict[str, Any] = {
    "name": "run",
    "output_dir": "runs",
    "model": {**MODEL, "text_config": {**MODEL["text_config"], "attention_dropout": 0.0}},  # as packing needs
    "data": {
        "train": [{"manifest": "cohort/train.jsonl"}],
        "cache_dir": "cache",
        "batches": "mixed",
        "packing": True,
        "on_bad_scan": "skip",
    },
    "trainer": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_num_workers": 1,
    },
    "report": {"enabled": False, "pictures": False},
}
# MONAI takes each process that loads data seconds to import.
AUGMENTED = {**CONFIG, "data": {**CONFIG["data"], "pipelines": {name: {"augment": {}} for name in MODEL["modalities"]}}}


def start(folder: Path, *arguments: str, config: dict[str, Any], without: str) -> subprocess.Popen[str]:
    """The commands in a process of their own, with its start method and options of `check` as arguments."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(without)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "commands.py").write_text(RUN)
    return subprocess.Popen(
        [sys.executable, "commands.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[float]:
    (metrics,) = folder.glob("runs/**/metrics.jsonl")
    return [line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]


# Processes start by spawn on macOS; each of them imports everything again, which takes a minute.
@pytest.fixture(scope="module", params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Folders of the commands with and without the names, and what the second wrote to stderr."""
    here = tmp_path_factory.mktemp("systems")
    config = CONFIG if request.param == "fork" else AUGMENTED
    started = {
        "with": start(here / "with", "fork", "--workers", "1", config=config, without=""),
        "without": start(here / "without", request.param, config=config, without=WITHOUT),
    }
    written = {name: process.communicate(timeout=280) for name, process in started.items()}
    for name, process in started.items():
        assert process.returncode == 0, written[name][1]
    assert [written[name][0].split()[0] for name in started] == ["True", "False"]
    return here / "with", here / "without", written["without"][1]


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux has")
def test_commands_give_the_same_results(folders: tuple[Path, Path, str]) -> None:
    complete, reduced, _ = folders
    assert contents(complete / "cohort").keys() >= {"train.jsonl", "test.jsonl", "dataset_description.json"}
    assert contents(complete / "cohort") == contents(reduced / "cohort")
    assert contents(complete / "check") == contents(reduced / "check") != {}
    assert len(losses(complete)) == 2
    assert losses(complete) == losses(reduced)
    entries = [sorted(path.stat().st_size for path in folder.glob("cache/volumes/*/*")) for folder in folders[:2]]
    assert entries[0] == entries[1] != []


def test_missing_locks_are_a_warning(folders: tuple[Path, Path, str]) -> None:
    assert "cohort: this system has no file locks" in folders[2]
