"""The README's first commands, as someone runs them who has only Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def try_readme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import try_readme

    return try_readme


def test_the_first_command_gets_uv_and_the_others_use_it(try_readme):
    commands = try_readme.start_commands((ROOT / "README.md").read_text())
    assert commands[0].startswith("command -v uv >/dev/null || ")
    assert commands[1:] == ["uv run umbrella-train", "uv run pytest"]
    subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)


@pytest.mark.parametrize(
    "text", ["", "\n## Start\n## Next\n```bash\na\n```\n", "\n## Start\n" + "```bash\na\n```\n" * 2]
)
def test_a_readme_without_one_block_of_commands_is_an_error(text, try_readme):
    with pytest.raises(ValueError, match=r"README\.md"):
        try_readme.start_commands(text)


def test_the_shell_has_python_and_no_uv_and_no_settings(try_readme, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("UV_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    environment = try_readme.plain_environment(tmp_path / "home")
    assert {"PYTHONPATH", "UV_CACHE_DIR", "VIRTUAL_ENV"} & environment.keys() == set()
    assert environment["HTTPS_PROXY"] == "http://proxy"
    assert [path.name for path in Path(environment["HOME"]).iterdir()] == ["bin"]
    words = ["python3", "-c", "import sys, venv; print(sys.prefix == sys.base_prefix, sys.version_info[:2])"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"True {sys.version_info[:2]}\n"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("uv", path="/usr/bin:/bin") is not None, reason="uv is among the system's programs")
def test_the_commands_of_the_readme_run_without_uv():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/try_readme.py"], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    assert "run folder: " in done.stdout
