"""Files that belong to a scan by BIDS' inheritance principle: next to it under its name, or above it in its BIDS tree.

An inherited file applies to every scan that has all of its entities: `task-rest_bold.json` in the top folder of a tree
to `sub-01_task-rest_run-1_bold.nii.gz`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from umbrella_data.files.paths import scan_stem, sibling_file

_MAX_LEVELS = 5
_SCAN_ENDINGS = (".nii", ".nii.gz", ".img")


def applicable_files(scan: Path, ending: str) -> Iterator[Path]:
    """The existing files with an ending that apply to a scan, by decreasing precedence.

    Args:
        scan: The scan.
        ending: In lower case, such as `.bval`; the same ending in upper case has a lower precedence. A broken link
            exists: a file of lower precedence must not silently replace it.
    """
    own = sibling_file(scan, ending)
    if os.path.lexists(own):
        yield own
    *entities, suffix = scan_stem(scan.name).split("_")
    stems = [
        "_".join([*chosen, suffix])
        for count in range(len(entities), -1, -1)
        for chosen in combinations(entities, count)
    ]
    for folder in _folders_above(scan):
        candidates = (folder / f"{stem}{each}" for stem in stems for each in (ending, ending.upper()))
        yield from (file for file in candidates if file != own and os.path.lexists(file))


def stays_in_tree(file: Path, scan: Path) -> bool:
    """Whether an inherited file is in the BIDS tree of its scan, symbolic links resolved.

    True for a file next to its scan: the paths of a manifest are checked against its own root.
    """
    tree = _folders_above(scan)
    is_own = file.parent == scan.parent and scan_stem(file.stem) == scan_stem(scan.name)
    return is_own or not tree or Path(os.path.realpath(file)).is_relative_to(os.path.realpath(tree[-1]))


def gradient_file(dwi: Path, ending: str) -> Path:
    """The `.bval` or `.bvec` file of a DWI.

    The first one of: the file under its name, an inherited one, and `bvals.txt` or `bvals` (`bvecs.txt`, `bvecs`) next
    to it if no other DWI is in the folder. Without any, the name of the first, which does not exist.

    Args:
        dwi: The series.
        ending: `.bval` or `.bvec`.
    """
    found = next(applicable_files(dwi, ending), None)
    if found is None:
        plain = (dwi.with_name(f"{ending[1:]}s{end}") for end in (".txt", ""))
        found = next((file for file in plain if os.path.lexists(file) and _is_only_dwi(dwi)), None)
    return sibling_file(dwi, ending) if found is None else found


def _folders_above(scan: Path) -> list[Path]:
    """The scan's folder and those above it, up to the root of its BIDS tree; empty if it is in no such tree."""
    folders = list(scan.absolute().parents)[:_MAX_LEVELS]
    for level, folder in enumerate(folders):
        if (folder / "dataset_description.json").exists():
            return folders[: level + 1]
    return []


def _is_only_dwi(dwi: Path) -> bool:
    """Whether no other file of the folder may be a DWI: BIDS names of other suffixes and masks are none."""
    names = (file.name for file in dwi.parent.iterdir() if file.name.lower().endswith(_SCAN_ENDINGS))
    others = {scan_stem(name) for name in names} - {scan_stem(dwi.name)}
    return not any(stem.endswith("dwi") or not (stem.startswith("sub-") or stem.endswith("mask")) for stem in others)
