"""Releases: the guard of versions and changelog, the command that sets them, and the workflow that publishes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ["pyproject.toml", "CITATION.cff", "CHANGELOG.md"]
FILES += [f"packages/umbrella-{name}/pyproject.toml" for name in ("data", "model", "train")]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import release_notes
    import set_version

    return release_notes, set_version


@pytest.fixture
def released(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> Path:
    """The files that state a version, after 7.8.9 was set."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "CHANGELOG.md"
    path.write_text(path.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n### Added\n- One `thing`.\n", 1))
    tools[1].set_version(tmp_path, "7.8.9", today="2031-02-03")
    return tmp_path


def notes(version: str, root: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "tools/release_notes.py"), version, str(root)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_one_command_sets_every_version(tools, released):
    found = tools[0].written_versions(released)
    assert set(found.values()) == {"7.8.9"}
    assert len(found) == 7  # with two requirements of umbrella-train
    assert "date-released: 2031-02-03" in (released / "CITATION.cff").read_text().splitlines()
    changelog = (released / "CHANGELOG.md").read_text()
    assert tools[0].released_versions(changelog)[0] == "7.8.9"
    assert "Nothing has been" not in changelog
    assert notes("7.8.9", released).stdout.startswith("### Added\n- One `thing`.\n")
    # A second release, whose notes are its own.
    path = released / "CHANGELOG.md"
    path.write_text(changelog.replace("## [Unreleased]\n", "## [Unreleased]\n### Fixed\n- Another.\n", 1))
    tools[1].set_version(released, "7.9.0", today="2031-03-04")
    assert notes("7.9.0", released).stdout == "### Fixed\n- Another.\n"
    assert (released / "CITATION.cff").read_text().count("date-released") == 1
    assert notes("7.8.9", released).returncode == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_another_version_prevents_the_release(name, released):
    path = released / name
    path.write_text(re.sub(r"(?<=[\"\[ ])7\.8\.9", "7.8.8", path.read_text(), count=1))
    done = notes("7.8.9", released)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{name}: ")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("needed", ["", ">=7.8.9", "==7.8.8"])
def test_packages_require_the_exact_version_of_each_other(needed, released):
    path = released / "packages/umbrella-train/pyproject.toml"
    path.write_text(path.read_text().replace('"umbrella-model==7.8.9"', f'"umbrella-model{needed}"'))
    done = notes("7.8.9", released)
    assert done.returncode == 1
    assert "packages/umbrella-train/pyproject.toml: umbrella-model: " in done.stderr


def test_all_problems_of_another_tag_are_listed(released):
    done = notes("7.9.0", released)
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if "7.9.0" in line]) == 8


@pytest.mark.parametrize("version", ["v1.2.3", "1.2", "1.2.3rc1", "01.2.3", "7.8.9"])
def test_no_other_version_can_be_set(version, tools, released):
    before = {name: (released / name).read_text() for name in FILES}
    with pytest.raises(ValueError, match=re.escape(version)):
        tools[1].set_version(released, version, today="2031-02-03")
    assert {name: (released / name).read_text() for name in FILES} == before


def test_a_release_needs_entries(tools, released):
    with pytest.raises(ValueError, match="Unreleased"):
        tools[1].set_version(released, "7.9.0", today="2031-02-03")


def workflow(name: str) -> dict:
    # YAML 1.1 reads the key `on` as true.
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())


def test_the_release_is_published_without_tokens_after_all_checks():
    release = workflow("release.yml")
    jobs = release["jobs"]
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}
    assert "workflow_call" in workflow("ci.yml")[True]
    assert jobs["checks"]["uses"] == "./.github/workflows/ci.yml"
    assert set(jobs["publish"]["needs"]) == {"checks", "build"}
    assert jobs["announce"]["needs"] == jobs["docs"]["needs"] == "publish"
    assert jobs["publish"]["environment"] == "pypi"
    # Each job can do one thing only; the one that runs the build can write nothing.
    rights = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert rights == {
        "publish": {"id-token": "write"},
        "announce": {"contents": "write"},
        "docs": {"id-token": "write", "pages": "write"},
    }
    assert release["permissions"] == {"contents": "read"}
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "secrets." not in text
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    guard = next(index for index, step in enumerate(steps) if 'release_notes.py "${GITHUB_REF_NAME#v}"' in step)
    assert guard < next(index for index, step in enumerate(steps) if "uv build" in step)


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_actions_of_others_are_pinned_by_commit(name):
    steps = [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each)] == []
    checkouts = [step for step in steps if "actions/checkout" in step.get("uses", "")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False] * len(checkouts)
