"""Callbacks: seeds per step, metrics file, progress bar, stop on a signal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from umbrella_train.run_folder import RunFolder
from umbrella_train.stop_signals import StoppedAtOnce, StopSignals
from umbrella_train.trainer.callbacks import MetricsFile, ProgressBar, StepSeed, StopOnSignal


def state_at(step: int, *, is_first_rank: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, is_world_process_zero=is_first_rank)


def draw(*, seed: int = 0, step: int = 3, rank: int = 0) -> float:
    """Random numbers of a step, independent of earlier ones."""
    torch.rand(7)
    StepSeed().on_step_begin(SimpleNamespace(seed=seed, process_index=rank), state_at(step), TrainerControl())  # type: ignore[arg-type]
    return float(torch.rand(1, dtype=torch.float64))


def test_random_numbers_depend_only_on_seed_step_and_rank() -> None:
    assert draw() == draw()
    draws = {draw(), draw(seed=1), draw(step=4), draw(rank=1), draw(seed=33, step=0), draw(seed=3, step=30)}
    assert len(draws) == 6


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, name="run", config_text="name: run\n")


def steps_in(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def log(folder: RunFolder, *steps: int, is_first_rank: bool = True) -> None:
    for step in steps:
        MetricsFile(folder).on_log(
            None,  # type: ignore[arg-type]
            state_at(step, is_first_rank=is_first_rank),
            TrainerControl(),
            logs={"loss": step / 2},
        )


def begin(folder: RunFolder, step: int, *, is_first_rank: bool = True) -> None:
    MetricsFile(folder).on_train_begin(None, state_at(step, is_first_rank=is_first_rank), TrainerControl())  # type: ignore[arg-type]


def test_every_logged_line_is_written_with_its_step(folder: RunFolder) -> None:
    log(folder, 1, 2)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
    ]


def test_lines_after_the_checkpoint_are_removed_on_resume(folder: RunFolder) -> None:
    log(folder, 1, 2, 3, 4, 5)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    begin(folder, 3)
    log(folder, 4)
    assert steps_in(folder) == [1, 2, 3, 4]


def test_only_the_first_rank_writes_the_file(folder: RunFolder) -> None:
    log(folder, 1, 2)
    log(folder, 3, is_first_rank=False)
    begin(folder, 0, is_first_rank=False)
    assert steps_in(folder) == [1, 2]


def end_of_step(stop: StopOnSignal) -> tuple[bool, bool]:
    control = TrainerControl()
    stop.on_step_end(None, state_at(3), control)  # type: ignore[arg-type]
    return control.should_save, control.should_training_stop


def test_signal_stops_only_after_all_ranks_agree() -> None:
    stop = StopOnSignal()
    arguments: Any = (None, state_at(0), TrainerControl())
    before = signal.getsignal(signal.SIGTERM)
    stop.on_train_begin(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signals.is_asked
    assert end_of_step(stop) == (False, False)
    stop.is_agreed = True
    assert end_of_step(stop) == (True, True)
    stop.on_train_end(*arguments)
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_of_a_command_are_still_handled_after_training() -> None:
    signals = StopSignals()
    signals.install()
    try:
        stop = StopOnSignal(signals)
        arguments: Any = (None, state_at(0), TrainerControl())
        stop.on_train_begin(*arguments)
        stop.on_train_end(*arguments)
        with pytest.raises(StoppedAtOnce):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signals.restore()


def test_signal_on_another_rank_stops_this_one() -> None:
    stop = StopOnSignal()
    stop.is_agreed = True
    assert not stop.signals.is_asked
    assert stop.signals.number == signal.SIGTERM
    assert end_of_step(stop) == (True, True)


def test_progress_bar_starts_at_the_step_of_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.on_train_begin(None, state_at(4), TrainerControl())  # type: ignore[arg-type]
    assert " 4/10 " in capsys.readouterr().err
    bar.on_step_end(None, state_at(5), TrainerControl())  # type: ignore[arg-type]
    bar.on_log(None, state_at(5), TrainerControl(), logs={"loss": 0.25})  # type: ignore[arg-type]
    bar.on_train_end(None, state_at(5), TrainerControl())  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert "5/10" in shown.err
    assert "loss=0.2500" in shown.err
    assert shown.out == ""
    ProgressBar().on_train_begin(None, state_at(0, is_first_rank=False), TrainerControl())  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_error_after_the_bar_is_closed_starts_a_new_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.on_train_begin(None, state_at(4), TrainerControl())  # type: ignore[arg-type]
    bar.close()
    assert capsys.readouterr().err.endswith("\n")
    bar.close()
    assert capsys.readouterr().err == ""
