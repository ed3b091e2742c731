"""Launcher settings that the run does not support are rejected."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from umbrella_train.config import load_config
from umbrella_train.distributed.launcher import check_launcher
from umbrella_train.errors import RunError


def test_ordinary_launch_is_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launcher(load_config(None))


def test_fsdp_through_accelerate_is_rejected_with_the_engine_to_set(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"trainer\.engine: fsdp2"):
        check_launcher(load_config(None))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"trainer\.torch_compile: true instead"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 gradient accumulation steps and the config for 1"),
    ],
)
def test_unsupported_accelerate_setting_is_rejected(monkeypatch, variable, value, says):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    check_launcher(load_config(None))
    monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=says):
        check_launcher(load_config(None))


@pytest.mark.parametrize(
    ("asked", "words", "is_fine"), [("bf16", [], False), ("bf16", ["--trainer.bf16", "true"], True)]
)
def test_precision_of_launcher_and_config_must_match(monkeypatch, asked, words, is_fine):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    if is_fine:
        check_launcher(load_config(None, words))
    else:
        with pytest.raises(RunError, match=r"trainer\.bf16: true"):
            check_launcher(load_config(None, words))


ORPHAN = """
import os, pathlib, signal, sys, time
from umbrella_train.distributed import launcher
launcher._WATCH_SECONDS, launcher._GRACE_SECONDS = 0.05, float(sys.argv[2])
folder = pathlib.Path(sys.argv[1])
if os.fork() == 0:
    if sys.argv[3] == "saves":
        signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), os._exit(0)))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    launcher.stop_with_launcher()
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
while not (folder / "pid").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("kind", ["saves", "hangs"])
def test_a_rank_stops_when_its_launcher_is_gone(kind: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", ORPHAN, str(tmp_path), "0.2", kind]
    # Its output would keep the pipes of this process open.
    subprocess.run(words, check=True, env={**os.environ, "TORCHELASTIC_RUN_ID": "1"}, stderr=subprocess.DEVNULL)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "saved").exists() == (kind == "saves")
