"""The check of public names against the last release, in repositories with one small package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "check_api.py"
INIT = """
import lazy_loader
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "1"
"""
STUB = 'from .shapes import Cube, area\n\n__all__ = ["Cube", "area"]\n__version__: str\n'
SHAPES = """
class Cube:
    def __init__(self, side: int) -> None: ...
    def volume(self, unit: str = "mm") -> int: ...
def area(side: int, *, unit: str = "mm") -> int: ...
def unlisted() -> None: ...
"""
CHANGELOG = """
## [Unreleased]
### Added
- `area`.
### Changed
- Nothing.

## [0.1.0]
### Removed
- `area`.
"""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A repository with a released package."""
    package = tmp_path / "packages" / "solid" / "src" / "solid"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(INIT)
    (package / "__init__.pyi").write_text(STUB)
    (package / "shapes.py").write_text(SHAPES)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "--quiet", "--no-gpg-sign", "-m", "first")
    git(tmp_path, "tag", "v0.1.0")
    return tmp_path


@pytest.fixture
def change(release: Path) -> Callable[[str, str], None]:
    """Replaces a text in all files of the package."""

    def replace(old: str, new: str) -> None:
        for path in (release / "packages" / "solid" / "src" / "solid").iterdir():
            path.write_text(path.read_text().replace(old, new))

    return replace


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True)


def check(folder: Path) -> tuple[int, list[str]]:
    """Exit code, and the names that are errors."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    errors = [line.split("`")[1] for line in done.stdout.splitlines() if line.startswith("error: ")]
    return done.returncode, errors


def test_without_a_change_or_with_a_private_one_it_passes(release: Path, change: Callable[[str, str], None]) -> None:
    assert check(release) == (0, [])
    change("def unlisted() -> None: ...", "")
    change("shapes", "forms")
    package = release / "packages" / "solid" / "src" / "solid"
    (package / "shapes.py").rename(package / "forms.py")
    assert check(release) == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (', "area"]', "]", "area"),
        ('area(side: int, *, unit: str = "mm")', "area(side: int)", "area"),
        ("self, side: int", "self, side: int, depth: int", "Cube"),
        ("def volume", "def content", "Cube.volume"),
    ],
)
def test_breaking_change_is_an_error_until_the_changelog_names_it(
    release: Path, change: Callable[[str, str], None], old: str, new: str, name: str
) -> None:
    change(old, new)
    assert check(release) == (1, [name])
    (release / "CHANGELOG.md").write_text(CHANGELOG.replace("Nothing", f"`{name}`"))
    assert check(release) == (0, [])


def test_without_a_release_nothing_is_compared(release: Path, change: Callable[[str, str], None]) -> None:
    git(release, "tag", "--delete", "v0.1.0")
    git(release, "tag", "draft")
    change(', "area"]', "]")
    assert check(release) == (0, [])
