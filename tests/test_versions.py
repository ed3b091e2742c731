"""The packages, the workspace and the citation have one version, which the commands print."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import umbrella_data
import umbrella_model
import umbrella_train

ROOT = Path(__file__).parents[1]


def test_all_versions_are_equal() -> None:
    files = [ROOT / "pyproject.toml", *(ROOT / "packages").glob("*/pyproject.toml")]
    versions = {path: tomllib.loads(path.read_text())["project"]["version"] for path in files}
    assert len(versions) == 4
    versions[ROOT / "CITATION.cff"] = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    installed = {package.__version__ for package in (umbrella_data, umbrella_model, umbrella_train)}
    assert {*versions.values(), *installed} == {umbrella_data.__version__}


@pytest.mark.parametrize("command", ["data", "train", "eval", "predict", "report"])
def test_commands_print_it(command: str) -> None:
    words = [Path(sys.executable).parent / f"umbrella-{command}", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"umbrella-{command} {umbrella_data.__version__}\n"
