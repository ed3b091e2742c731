"""One version for the three packages, their workspace and the citation; read without loading torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "model", "train")


@pytest.fixture
def release_notes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import release_notes

    return release_notes


def test_every_file_states_the_same_version(release_notes):
    found = release_notes.written_versions(ROOT)
    # The last two are requirements of umbrella-train.
    assert list(found) == [
        "pyproject.toml",
        "packages/umbrella-data/pyproject.toml",
        "packages/umbrella-model/pyproject.toml",
        "packages/umbrella-train/pyproject.toml",
        "packages/umbrella-train/pyproject.toml: umbrella-data",
        "packages/umbrella-train/pyproject.toml: umbrella-model",
        "CITATION.cff",
    ]
    assert len(set(found.values())) == 1, found
    # The newest release, if there was one, is what the files state until the next.
    assert release_notes.released_versions((ROOT / "CHANGELOG.md").read_text())[:1] in ([], [found["pyproject.toml"]])


def test_packages_have_the_version_that_is_installed(release_notes):
    for name in PACKAGES:
        package = __import__(f"umbrella_{name}")
        assert package.__version__ == version(f"umbrella-{name}")
        # After a change of the version, uv sync installs it.
        assert package.__version__ == release_notes.written_versions(ROOT)["pyproject.toml"]
        assert "__version__" not in package.__all__


COMMANDS = {entry.name: entry.value for entry in entry_points(group="console_scripts") if "umbrella" in entry.name}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_the_version_without_loading_torch(command):
    module, function = COMMANDS[command].split(":")
    code = (
        f"import sys; from {module} import {function}\n"
        f"try: {function}(['--version'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'monai'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{command} {version('umbrella-train')}\n"), done.stderr


def test_every_command_is_tried():
    assert len(COMMANDS) == 6
