"""Trackers that raise, hang or fall behind: one warning, and training is as without them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from umbrella_train.config import RunConfig, dump_config
from umbrella_train.trainer import tracking
from umbrella_train.trainer.trackers import TRACKERS
from umbrella_train.trainer.tracking import Trackers

MakeConfig = Callable[..., RunConfig]
Fake = Callable[..., Any]
CALLS = ("start", "log", "finish")
TIMES = {"runtime", "second"}  # words of keys whose values differ in each run


class Recorder:
    """Takes the part of a tracker's modules; one call may do something else."""

    def __init__(self) -> None:
        self.faults: dict[str, Callable[[], None]] = {}
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.state = ""

    def start(self, config: Mapping[str, Any] | None = None) -> Any:
        self.faults.get("start", bool)()
        self.settings = dict(config or {})
        return SimpleNamespace(offline=True, dir="wandb/run/files", config=self.settings)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.faults.get("log", bool)()
        self.lines.append((step, dict(numbers)))

    def finish(self, state: Any = None) -> None:
        self.faults.get("finish", bool)()
        self.state = str(state)


def fake_wandb(recorder: Recorder) -> dict[str, ModuleType]:
    return {
        "wandb": module(
            init=lambda *, config, **_: recorder.start(config),
            log=recorder.log,
            finish=lambda *, exit_code: recorder.finish(exit_code),
            Settings=dict,
        )
    }


def fake_tensorboard(recorder: Recorder) -> dict[str, ModuleType]:
    class Writer:
        def __init__(self, **_: Any) -> None:
            recorder.start()

        def add_text(self, key: str, text: str, global_step: int) -> None:
            recorder.settings = json.loads(text)

        def add_scalar(self, key: str, number: float, global_step: int) -> None:
            recorder.log({key: number}, global_step)

        def close(self) -> None:
            recorder.finish()

    return {
        "tensorboard.summary.writer": module(event_file_writer=SimpleNamespace()),
        "torch.utils.tensorboard": module(SummaryWriter=Writer),
    }


def fake_trackio(recorder: Recorder) -> dict[str, ModuleType]:
    parts = {"run": module(), "utils": module()}
    start = {"init": lambda *, config, **_: recorder.start(config)}
    return {"trackio": module(log=recorder.log, finish=recorder.finish, **start, **parts)}


def fake_mlflow(recorder: Recorder) -> dict[str, ModuleType]:
    class Client:
        def __init__(self, uri: str | None) -> None:
            recorder.start()

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="1")

        def create_run(self, experiment: str, run_name: str) -> Any:
            return SimpleNamespace(info=SimpleNamespace(run_id="2"))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            recorder.settings |= dict(params)
            if metrics:
                recorder.log({key: number for key, number, _, _ in metrics}, metrics[0][3])

        def set_terminated(self, run: str, status: str) -> None:
            recorder.finish(status)

    entities = SimpleNamespace(Param=lambda *words: words, Metric=lambda *words: words)
    return {"mlflow": module(MlflowClient=Client, entities=entities)}


FAKES = {"wandb": fake_wandb, "tensorboard": fake_tensorboard, "trackio": fake_trackio, "mlflow": fake_mlflow}


def module(**content: Any) -> ModuleType:
    made = ModuleType("fake")
    vars(made).update(content)
    return made


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Fakes of all trackers, with little patience for them."""
    recorders = {name: Recorder() for name in TRACKERS}
    for name, fake in FAKES.items():
        for path, made in fake(recorders[name]).items():
            monkeypatch.setitem(sys.modules, path, made)
    for name in ("WANDB_MODE", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setattr(tracking, "START_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "guard_exit", lambda: None)  # it would end pytest
    return recorders


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set at the end of a test, so that threads end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def make_trackers(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Trackers]:
    def make(*names: str, step: int = 0) -> Trackers:
        (tmp_path / "run").mkdir(exist_ok=True)
        config = make_config(tmp_path, trainer={"report_to": list(names)})
        return Trackers(config, tmp_path / "run", step=step, num_parameters=7)

    return make


def train(trackers: Trackers, *, num_steps: int = 3) -> None:
    with trackers:
        for step in range(1, num_steps + 1):
            trackers.log({"step": step, "loss": step / 2, "grad/[T1]/x": None, "nan": float("nan"), "is": True})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == tracking.__name__]


@pytest.mark.parametrize("name", TRACKERS)
def test_finite_numbers_and_public_settings_are_sent(
    name: str, recorders: dict[str, Recorder], make_trackers: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    train(make_trackers(name))
    assert recorders[name].lines == [(step, {"loss": step / 2}) for step in (1, 2, 3)]
    assert {str(value) for key, value in recorders[name].settings.items() if key == "num_parameters"} == {"7"}
    assert recorders[name].state in ("0", "FINISHED", "None")
    with pytest.raises(KeyError), make_trackers(name):
        raise KeyError
    assert recorders[name].state in ("1", "FAILED", "None")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["raises", "exits", "hangs"])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_costs_one_warning(
    name: str,
    fault: str,
    call: str,
    recorders: dict[str, Recorder],
    make_trackers: Callable[..., Trackers],
    released: threading.Event,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def fail() -> None:
        if fault == "hangs":
            released.wait()
        raise {"raises": OSError, "exits": SystemExit}.get(fault, ValueError)("no route to https://me:secret@host")

    recorders[name].faults[call] = fail
    (other,) = {"wandb", "mlflow"} - {name} if name in ("wandb", "mlflow") else {"wandb"}
    train(make_trackers(name, other))
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{name}: {call} ")
    assert str(tmp_path / "run" / "metrics.jsonl") in warning
    assert ("no route to https://host" in warning) == (fault != "hangs")
    assert len(recorders[name].lines) == (3 if call == "finish" else 0)
    assert len(recorders[other].lines) == 3
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tracker"):
            thread.join()
    assert len(warnings_of(caplog)) == 1


def test_a_tracker_that_is_not_there_is_given_up(
    make_trackers: Callable[..., Trackers],
    recorders: dict[str, Recorder],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    train(make_trackers("trackio"))
    assert ["start failed: ModuleNotFoundError" in warning for warning in warnings_of(caplog)] == [True]


@pytest.mark.skipif(
    not hasattr(time, "pthread_getcpuclockid"), reason="the system does not measure CPU time of threads"
)
def test_a_tracker_that_computes_has_more_time(
    make_trackers: Callable[..., Trackers],
    recorders: dict[str, Recorder],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute() -> None:
        while time.thread_time() < 0.4:
            pass

    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    recorders["mlflow"].faults["finish"] = compute
    train(make_trackers("mlflow"))
    assert warnings_of(caplog) == []
    assert recorders["mlflow"].state == "FINISHED"


def test_lines_that_wait_are_limited(
    make_trackers: Callable[..., Trackers],
    recorders: dict[str, Recorder],
    released: threading.Event,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "MAX_LINES", 5)
    recorders["wandb"].faults["log"] = released.wait  # type: ignore[assignment]
    train(make_trackers("wandb"), num_steps=50)
    assert ["5 lines behind" in warning for warning in warnings_of(caplog)] == [True]


def test_a_call_that_takes_too_long_is_given_up_during_training(
    make_trackers: Callable[..., Trackers],
    recorders: dict[str, Recorder],
    released: threading.Event,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.0)
    recorders["mlflow"].faults["start"] = released.wait  # type: ignore[assignment]
    with make_trackers("mlflow") as trackers:
        trackers.log({"step": 1})
        assert ["mlflow: start has not returned" in warning for warning in warnings_of(caplog)] == [True]


# Hangs in one call, and then at exit: in a hook, a thread and a service that holds the output open.
HANGING_WANDB = """
import atexit, subprocess, sys, threading

def hang(*_, **__):
    atexit.register(threading.Event().wait)
    threading.Thread(target=threading.Event().wait).start()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    threading.Event().wait()

class Run:
    offline, dir = True, "here/files"

Settings = dict
init = log = finish = lambda *_, **__: Run
{call} = hang
"""


@pytest.mark.slow
def test_a_run_with_a_hanging_tracker_has_the_metrics_and_weights_of_one_without(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    runs = []
    for name in ("without", "init", "log", "finish"):
        (tmp_path / "wandb.py").write_text(HANGING_WANDB.format(call=name))
        trackers = [] if name == "without" else ["wandb"]
        config = make_config(tmp_path, trainer={"max_steps": 2, "report_to": trackers})
        (tmp_path / "config.yaml").write_text(dump_config(config.model_copy(update={"name": name})))
        command = [sys.executable, "-m", "umbrella_train", "--config", str(tmp_path / "config.yaml"), "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "WANDB_MODE": "offline"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        assert f"run folder: {tmp_path / name}\n" in done.stdout
        assert done.stderr.count("training continues without this tracker") == len(trackers)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines = [{key: value for key, value in row.items() if not TIMES & set(key.split("_"))} for row in rows]
        assert len(lines) == 4
        runs.append((lines, (tmp_path / name / "model" / "model.safetensors").read_bytes()))
    assert [run == runs[0] for run in runs] == [True] * 4
