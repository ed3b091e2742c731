"""Prints the release notes of a version, the section of CHANGELOG.md: `python tools/release_notes.py 0.1.0`.

The exit code is 1, with every problem on stderr, if a file states another version, a package requires another version
of a package of this repository, or the changelog has no section `## [VERSION] - DATE` with entries.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def written_versions(root: Path) -> dict[str, str]:
    """The version in each file that states it, and in each requirement of another package of this repository.

    A requirement without an exact version is an empty text.
    """
    found = {}
    for path in (root / "pyproject.toml", *sorted(root.glob("packages/*/pyproject.toml"))):
        project, name = tomllib.loads(path.read_text(encoding="utf-8"))["project"], str(path.relative_to(root))
        found[name] = project["version"]
        if path.parent == root:  # not published
            continue
        for need in (project["dependencies"], *project.get("optional-dependencies", {}).values()):
            for requirement in need:
                if match := re.fullmatch(r"(umbrella-\w+)(?:\[[\w,-]+\])?(?:==([\w.+!-]+))?.*", requirement):
                    found[f"{name}: {match[1]}"] = match[2] or ""
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    return found | {"CITATION.cff": "".join(re.findall(r"^version: (.+)$", citation, re.MULTILINE))}


def released_versions(changelog: str) -> list[str]:
    """The versions with a section in the changelog, in its order, the newest first."""
    return re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)


def find_notes(changelog: str, version: str) -> str:
    """The entries of a version; an empty text if it has no section or the section no entries."""
    head = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    match = re.search(head, changelog, re.DOTALL | re.MULTILINE)
    return match[1].strip() if match else ""


def find_problems(root: Path, version: str) -> list[str]:
    """Everything that prevents the release of a version."""
    problems = [
        f"{place}: {f'version {found}' if found else 'no exact version'}, but the release is {version}"
        for place, found in written_versions(root).items()
        if found != version
    ]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not find_notes(changelog, version):
        problems.append(f"CHANGELOG.md: no entries below a heading `## [{version}] - YYYY-MM-DD`")
    elif released_versions(changelog)[0] != version:
        problems.append(f"CHANGELOG.md: {released_versions(changelog)[0]} is above {version}; the newest comes first")
    return problems


def main() -> int:
    """Print the notes, or what is wrong; returns 1 in that case."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python tools/release_notes.py VERSION [ROOT]")
    version, root = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT
    if problems := find_problems(root, version):
        print("\n".join([*problems, "`python tools/set_version.py VERSION` sets all of them."]), file=sys.stderr)
        return 1
    print(find_notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), version))
    return 0


if __name__ == "__main__":
    sys.exit(main())
