"""Sets the version of a release in every file that states one: `python tools/set_version.py 0.2.0`.

These are the four pyproject.toml, what the packages require of each other, and CITATION.cff. The entries below
`[Unreleased]` in CHANGELOG.md become those of the version, with today's date (UTC).
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from release_notes import ROOT, find_notes, find_problems, released_versions

UNRELEASED = "## [Unreleased]\n"
NOTHING_YET = re.compile(r" Nothing has been\s+released yet\.")


def set_version(root: Path, version: str, *, today: str) -> None:
    """Write the version, and the date as YYYY-MM-DD, into the files below the root.

    Raises:
        ValueError: For a version that is not X.Y.Z, or is already in the changelog; nothing is written then.
    """
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise ValueError(f"{version}: not a version X.Y.Z, as in 0.2.0")
    path = root / "CHANGELOG.md"
    changelog = path.read_text(encoding="utf-8")
    if version in released_versions(changelog):
        raise ValueError(f"CHANGELOG.md: {version} is already there")
    changelog = changelog.replace(UNRELEASED, f"{UNRELEASED}\n## [{version}] - {today}\n", 1)
    if not find_notes(changelog, version):
        raise ValueError("CHANGELOG.md: no entries below `## [Unreleased]`; describe the release there first")
    path.write_text(NOTHING_YET.sub("", changelog), encoding="utf-8")
    for path in (root / "pyproject.toml", *root.glob("packages/*/pyproject.toml")):
        text = re.sub(
            r'^version = ".*"$', f'version = "{version}"', path.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        text = re.sub(r'("umbrella-\w+(?:\[[\w,-]+\])?)==[^"]*"', rf'\g<1>=={version}"', text)
        path.write_text(text, encoding="utf-8")
    path = root / "CITATION.cff"
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("date-released:")]
    place = next(index for index, line in enumerate(kept) if line.startswith("version:"))
    kept[place : place + 1] = [f"version: {version}", f"date-released: {today}"]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> int:
    """Set the version; returns 1 if a file still states another."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/set_version.py VERSION")
    try:
        set_version(ROOT, sys.argv[1], today=f"{datetime.now(UTC):%Y-%m-%d}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    problems = find_problems(ROOT, sys.argv[1])
    print("\n".join(problems or [f"version {sys.argv[1]}: commit, and push the tag v{sys.argv[1]} after the checks"]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
