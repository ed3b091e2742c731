"""What a tracker receives, and what it must not receive."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
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


def test_offline_run_has_the_metrics_and_no_facts_of_the_machine(
    home: Path, make_config: MakeConfig, cohort: DemoCohort
) -> None:
    work = home / "somewhere"
    shutil.copytree(cohort.train_manifest.parent, work / SECRET)
    # Credentials of another service: wandb would fail with them.
    (home / ".netrc").write_text("machine example.org login me password word\n")
    commit = commit_something(work)
    config = make_config(Path("runs"), trainer={"max_steps": 1, "use_cpu": True, "report_to": ["wandb"]})
    (work / "config.yaml").write_text(dump_config(config))
    manifest = work / SECRET / cohort.train_manifest.name
    options = ["--config", "config.yaml", "--data.train.0.manifest", str(manifest), "--output-dir", str(work / "runs")]
    command = [sys.executable, "-m", "umbrella_train", *options]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no key for api.wandb.ai" in done.stderr
    files = {path: path.read_bytes() for path in (work / "runs" / "wandb").rglob("*") if path.is_file()}
    (record,) = [content for path, content in files.items() if path.suffix == ".wandb" and not path.is_symlink()]
    for name in (b"train/loss", b"eval/accuracy/T1", b"learning_rate", b"patch_size"):
        assert name in record, name
    host = socket.gethostname()
    private = [SECRET, str(work), str(home), sys.executable, str(Path(sys.executable).parent), commit, f'"{host}"']
    for word in private:
        assert [path for path, content in files.items() if word.encode() in content] == [], word
    # A short host name is found by chance in other words, so here as a field of its own.
    field = bytes([len(host)]) + host.encode()
    assert [path for path, content in files.items() if field in content] == []


def commit_something(folder: Path) -> str:
    """A repository with one commit, whose hash is returned."""
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for arguments in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return found.stdout.strip()
