"""What a tracker receives, and what it must not receive."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.config import RunConfig, dump_config
from umbrella_train.trainer.trackers import has_wandb_key, public_settings

MakeConfig = Callable[..., RunConfig]
SECRET = "klopstock"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home folder, and no environment variable that wandb reads."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_netrc_is_a_key_only_for_its_host(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_key()
    netrc = home / ".netrc"
    netrc.write_text("machine example.org login me password word\ndefault login me password word\n")
    netrc.chmod(0o600)
    assert not has_wandb_key()
    netrc.write_text("machine api.wandb.ai login user password word\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not has_wandb_key()
    netrc.write_text("machine wandb.example.org login user password word\n")
    assert has_wandb_key()
    netrc.write_text("not a netrc at all")
    assert not has_wandb_key()


def test_key_in_the_environment_is_a_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "word")
    assert has_wandb_key()


def test_settings_have_no_path(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / SECRET).mkdir()
    config = make_config(tmp_path / "runs")
    for name in (str(tmp_path / SECRET), "./nowhere/" + SECRET):
        local = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": name})})
        settings = public_settings(local)
        assert str(tmp_path) not in str(settings)
        assert SECRET not in str(settings)
    assert settings["trainer"]["learning_rate"] == config.trainer.learning_rate
    assert settings["model"]["modalities"]["T1"]["patch_size"] == [8, 8, 8]
    hub = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": "maker/name"})})
    assert public_settings(hub)["model"]["tokenizer"] == "maker/name"


# Ends after the metrics are written everywhere, also on a machine that is busy.
PATIENT = (
    "from umbrella_train import cli; from umbrella_train.trainer import tracking; "
    "tracking.FINISH_SECONDS = tracking.MAX_FINISH_SECONDS = 90.0"
)


def test_each_tracker_has_the_metrics_and_no_facts_of_the_machine(
    home: Path, make_config: MakeConfig, cohort: DemoCohort
) -> None:
    for name in ("tensorboard", "trackio", "mlflow"):
        pytest.importorskip(name)
    work = home / "somewhere"
    shutil.copytree(cohort.train_manifest.parent, work / SECRET)
    # Credentials of another service: wandb would fail with them.
    (home / ".netrc").write_text("machine example.org login me password word\n")
    commit = commit_something(work)
    names = ["wandb", "tensorboard", "trackio", "mlflow"]
    config = make_config(Path("runs"), trainer={"max_steps": 2, "use_cpu": True, "report_to": names})
    (work / "config.yaml").write_text(dump_config(config))
    manifest = work / SECRET / cohort.train_manifest.name
    options = ["--config", "config.yaml", "--data.train.0.manifest", str(manifest), "--output-dir", str(work / "runs")]
    command = [sys.executable, "-c", f"{PATIENT}; cli.train_command()", *options]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no key for api.wandb.ai" in done.stderr
    assert "training continues without" not in done.stderr
    run = work / "runs" / "run"
    assert "rackio" not in done.stdout
    metrics = read_metrics(run)
    assert {("learning_rate", 1), ("loss", 2), ("eval/accuracy/T1", 2)} < metrics.keys()
    assert read_tensorboard(run / "tensorboard") == pytest.approx(metrics, rel=1e-6)  # has single precision
    assert read_trackio(run / "trackio" / "umbrella.db") == pytest.approx(metrics, rel=1e-12)
    renamed = {(re.sub(r"[\[\]]", "_", key), step): value for (key, step), value in metrics.items()}
    assert read_mlflow(run / "mlflow" / "mlflow.db") == renamed
    (record,) = [path for path in (work / "runs" / "wandb").glob("*/*.wandb") if not path.parent.is_symlink()]
    for key, _ in metrics:
        assert key.encode() in record.read_bytes(), key
    folders = [work / "runs" / "wandb", *(run / name for name in names[1:])]
    files = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    for folder in folders:
        assert any(b"patch_size" in content for path, content in files.items() if folder in path.parents), folder
    host = socket.gethostname()
    private = [SECRET, str(work), str(home), sys.executable, str(Path(sys.executable).parent), commit, f'"{host}"']
    for word in private:
        assert [path for path, content in files.items() if word.encode() in content] == [], word
    # Short names are found by chance in other words, so here as fields of their own.
    for name in (host, getpass.getuser()):
        field = bytes([len(name)]) + name.encode()
        assert [path for path, content in files.items() if field in content or f".{name}." in path.name] == []


def read_metrics(run: Path) -> dict[tuple[str, int], float]:
    """The numbers of metrics.jsonl by key and step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(key, row["step"]): row[key] for row in rows for key in row.keys() - {"step"} if row[key] is not None}


def read_tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {(key, event.step): event.value for key in events.Tags()["scalars"] for event in events.Scalars(key)}


def read_trackio(file: Path) -> dict[tuple[str, int], float]:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT COUNT(*) FROM system_metrics").fetchone() == (0,)
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
        rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
    assert json.loads(config)["_Username"] is None
    return {(key, step): value for step, text in rows for key, value in json.loads(text).items()}


def read_mlflow(file: Path) -> dict[tuple[str, int], float]:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT key, value FROM tags").fetchall() == [("mlflow.runName", "run")]
        states = database.execute("SELECT status, user_id, source_name, source_version FROM runs").fetchall()
        rows = database.execute("SELECT key, step, value FROM metrics").fetchall()
    assert states == [("FINISHED", "unknown", "", "")]
    return {(key, step): value for key, step, value in rows}


def commit_something(folder: Path) -> str:
    """A repository with one commit, whose hash is returned."""
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for arguments in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return found.stdout.strip()
