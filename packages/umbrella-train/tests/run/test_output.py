"""What a training run and an evaluation write into a log file: plain lines, or nothing if they are quiet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from umbrella_train import cli
from umbrella_train.config import RunConfig, dump_config


@pytest.fixture(autouse=True)
def _hide_other_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def test_log_file_of_a_run(
    make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 3, "use_cpu": True}
    config = make_config(
        tmp_path, trainer=steps, report={"enabled": False, "pictures": False, "max_new_tokens": 2, "controls": False}
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    cli.train_command(["--config", str(path), "--name", "first"])
    out, err = capfd.readouterr()
    assert not {"\r", "\x1b"} & set(out + err)
    assert re.findall(r"^training: (\d)/2 \[.*step/s", err, re.MULTILINE)[-1] == "2"
    assert re.search(r"^training: 2/2 .*loss=\d", err, re.MULTILINE)
    assert re.search(r"^evaluating: (\d+)/\1 \[", err, re.MULTILINE)
    cli.train_command(["--config", str(path), "--name", "second", "--quiet"])
    out, err = capfd.readouterr()
    assert out.startswith("run folder: ")
    # Warnings of this tiny run remain.
    assert not re.search(r"^(training|evaluating):|tokens per scan|own scan", err, re.MULTILINE)
    cli.eval_command([str(tmp_path / "second"), "--quiet"])
    out, err = capfd.readouterr()
    assert out
    assert err == ""
