"""Compares the public names of the packages (`__all__`, and what they refer to) with the last release.

    uv run python tools/check_api.py [ROOT]

A removed name, a removed or required parameter, a changed default and the like are an error, unless the section
`[Unreleased]` of CHANGELOG.md names the object in backticks under `Changed` or `Removed`, such as `load_volume` or
`Pipeline.prepare`. The last release is the newest tag `v...` that the checked-out commit contains.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import griffe


def main() -> int:
    """Print every breaking change; returns 1 if the changelog misses one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    # `v[0-9]*`: tags for other purposes are no releases.
    tags = _git(root, "tag", "--merged", "HEAD", "--list", "v[0-9]*", "--sort=-creatordate").decode().split()
    if not tags:
        print("no public names were compared: there is no tag v... yet (a shallow clone has none, either)")
        return 0
    announced = _announced((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    missing = 0
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", tags[0], "packages"))) as release:
            release.extractall(scratch, filter="data")
        for name, explanation in _breaking_changes(Path(scratch), root):
            is_announced = name in announced
            missing += not is_announced
            # Colours, and the temporary folder, say nothing to a reader of a log.
            text = re.sub(r"\x1b\[\d+m", "", explanation).replace(f"{scratch}/", "").strip()
            print(f"{'in the changelog' if is_announced else 'error'}: `{name}`: {text}")
    print(f"public names compared with {tags[0]}: {missing} breaking change(s) that the changelog does not name")
    if missing:
        print("Restore them, or name them in backticks in CHANGELOG.md, [Unreleased], under Changed or Removed.")
    return int(missing > 0)


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, stdout=subprocess.PIPE, check=True).stdout


def _announced(changelog: str) -> set[str]:
    """Names in backticks under Changed or Removed of the section [Unreleased]; a call's parentheses are left out."""
    unreleased = re.split(r"^## ", changelog.partition("## [Unreleased]")[2], maxsplit=1, flags=re.MULTILINE)[0]
    parts = re.split(r"^### ", unreleased, flags=re.MULTILINE)
    entries = "".join(part for part in parts if part.startswith(("Changed", "Removed")))
    return {name.partition("(")[0] for name in re.findall(r"`([^`]+)`", entries)}


def _breaking_changes(old_root: Path, new_root: Path) -> Iterator[tuple[str, str]]:
    """Name and explanation of each breaking change of the packages that the old release has."""
    for init in sorted(old_root.glob("packages/*/src/*/__init__.py")):
        package, source = init.parent.name, init.parents[1].relative_to(old_root)
        if not (new_root / source / package).is_dir():
            yield package, "the package was removed"
            continue
        old, new = _load(package, old_root / source), _load(package, new_root / source)
        for change in griffe.find_breaking_changes(old, new):
            name = change.obj.path.removeprefix(f"{package}.")
            if not change.obj.is_alias:
                name = change.obj.path.removeprefix(f"{change.obj.module.path}.")
            yield name.removesuffix(".__init__"), change.explain(griffe.ExplanationStyle.ONE_LINE)


def _load(package: str, source: Path) -> griffe.Module:
    """Reads the sources of a package, without importing them; only the names in `__all__` are public."""
    module = griffe.load(package, search_paths=[source], allow_inspection=False, resolve_aliases=True)
    assert isinstance(module, griffe.Module), module
    if not module.exports:
        raise SystemExit(f"{source / package}: no __all__ was found in __init__.py or __init__.pyi")
    for name, member in list(module.members.items()):
        if name not in module.exports:
            # Modules are public to griffe unless they are marked; they must stay for the names that they define.
            member.public = False
            if member.is_alias or not member.is_module:
                module.del_member(name)
    return module


if __name__ == "__main__":
    sys.exit(main())
