"""Compares the public names of the three packages with those of the last tag; run by `.ci/run`.

    uv run python tools/check_api.py [--repository FOLDER]

A name in `__all__` that is gone, or a signature that breaks its callers, is an error unless the section `Unreleased` of
CHANGELOG.md names it in backticks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

PACKAGES = ("umbrella_data", "umbrella_model", "umbrella_train")


def main() -> int:
    """Print what breaks callers; 1 if the changelog does not name all of it."""
    parser = argparse.ArgumentParser(description="Compare the public API with that of the last tag.")
    parser.add_argument("--repository", type=Path, default=Path(__file__).parent.parent)
    repository = parser.parse_args().repository
    tag = last_tag(repository)
    if tag is None:
        print("there is no tag yet: nothing to compare with")
        return 0
    named = unreleased_names(repository / "CHANGELOG.md")
    breaks = [each for package in PACKAGES for each in breaking_changes(package, repository=repository, tag=tag)]
    missing = [text for name, text in breaks if name not in named]
    for _, text in breaks:
        print(text)
    if missing:
        print(f"{len(missing)} of {len(breaks)} changes since {tag} are not in CHANGELOG.md", file=sys.stderr)
        return 1
    print(f"{len(breaks)} breaking changes since {tag}, all of them in CHANGELOG.md")
    return 0


def last_tag(repository: Path) -> str | None:
    """The newest tag that the checkout descends from; None without one."""
    done = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0"], cwd=repository, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def breaking_changes(package: str, *, repository: Path, tag: str) -> Iterator[tuple[str, str]]:
    """Public name and description of every change that can break a caller."""
    sources = f"packages/{package.replace('_', '-')}/src"
    before = griffe.load_git(package, ref=tag, repo=repository, search_paths=[sources])
    now = griffe.load(package, search_paths=[repository / sources])
    for name in map(str, before.exports or ()):
        if name not in map(str, now.exports or ()):
            yield name, f"{package}.{name}: is gone"
            continue
        old, new = _target(before[name]), _target(now[name])
        for change in griffe.find_breaking_changes(old.parent, new.parent):
            if f"{change.obj.path}.".startswith((f"{old.path}.", f"{new.path}.")):
                yield name, f"{package}.{name}: {change.explain(griffe.ExplanationStyle.ONE_LINE)}"


def unreleased_names(changelog: Path) -> set[str]:
    """Words in backticks between the headings `Unreleased` and that of the newest release."""
    section = re.search(r"^## \[?Unreleased\]?$(.*?)(?=^## |\Z)", changelog.read_text(encoding="utf-8"), re.M | re.S)
    code = re.findall(r"`([^`]+)`", section[1]) if section else []
    return {word for text in code for word in re.findall(r"\w+", text)}


def _target(found: Any) -> Any:
    return found.final_target if found.is_alias else found


if __name__ == "__main__":
    sys.exit(main())
