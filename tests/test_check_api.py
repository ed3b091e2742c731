"""A break of the public API since the last tag is an error unless the changelog names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_api.py"
BEFORE = "def load(path, strict=True): ...\n"


def git(repository: Path, *words: str) -> None:
    who = {f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    subprocess.run(["git", *words], cwd=repository, env={**os.environ, **who}, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packages, one with a lazy public name, and a tag."""
    folder = tmp_path_factory.mktemp("api")
    for name in ("data", "model", "train"):
        package = folder / "packages" / f"umbrella-{name}" / "src" / f"umbrella_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("__all__ = []\n")
    package = folder / "packages/umbrella-data/src/umbrella_data"
    (package / "__init__.py").write_text(
        "import lazy_loader\n__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)\n"
    )
    (package / "__init__.pyi").write_text('from .reader import load\n\n__all__ = ["load"]\n')
    (package / "reader.py").write_text(BEFORE)
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [0.1.0]\n- `load`.\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def check(repository: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--repository", str(repository)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_breaks_since_the_last_tag(repository: Path) -> None:
    package = repository / "packages/umbrella-data/src/umbrella_data"
    assert check(repository)[0] == 0  # without a tag
    git(repository, "tag", "v0.1.0")
    assert check(repository)[0] == 0
    (package / "reader.py").write_text(BEFORE.replace("strict=True", "strict=True, mask=None"))
    assert check(repository)[0] == 0
    (package / "reader.py").write_text(BEFORE.replace(", strict=True", ""))
    code, printed = check(repository)
    assert code == 1
    assert "umbrella_data.load" in printed
    assert "strict" in printed
    (package / "__init__.pyi").write_text("__all__ = []\n")
    assert check(repository) == (1, "umbrella_data.load: is gone\n")
    changelog = repository / "CHANGELOG.md"
    changelog.write_text(
        changelog.read_text().replace("Unreleased]\n", "Unreleased]\n- `umbrella_data.load` is gone.\n")
    )
    assert check(repository)[0] == 0
