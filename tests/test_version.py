"""One version for the three packages, their workspace and the citation; read without loading torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "model", "train")


def written_versions() -> dict[str, str]:
    """The version in each file that states it."""
    paths = [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
    found = {str(path.relative_to(ROOT)): tomllib.loads(path.read_text())["project"]["version"] for path in paths}
    return found | {
        "CITATION.cff": re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[0]
    }


def test_every_file_states_the_same_version():
    found = written_versions()
    assert len(found) == 5
    assert len(set(found.values())) == 1, found


def test_packages_have_the_version_that_is_installed():
    for name in PACKAGES:
        package = __import__(f"umbrella_{name}")
        assert package.__version__ == version(f"umbrella-{name}")
        # After a change of the version, uv sync installs it.
        assert package.__version__ == written_versions()["pyproject.toml"]
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
    assert len(COMMANDS) == 5
