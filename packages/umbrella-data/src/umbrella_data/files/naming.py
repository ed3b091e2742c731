"""The files of one scan: a pair of `.hdr` and `.img`, and what stands beside a scan under its name."""

from __future__ import annotations

import os
from pathlib import Path

_HEADER, _VOXELS = ".hdr", ".img"
_ENDINGS = (".nii.gz", ".nii", _HEADER, _VOXELS)


def pair_of(path: str) -> tuple[str, str] | None:
    """The `.hdr` and the `.img` file of a pair, of which `path` is one; None for any other name."""
    stem, ending = path[:-4], path[-4:]
    if ending.lower() not in (_HEADER, _VOXELS):
        return None
    header, voxels = (_HEADER.upper(), _VOXELS.upper()) if ending.isupper() else (_HEADER, _VOXELS)
    # Whatever the name given is written like, it is that file.
    return (path, stem + voxels) if ending.lower() == _HEADER else (stem + header, path)


def scan_stem(name: str) -> str:
    """A scan's file name without its ending, in either case: what the files beside it are named by."""
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def file_beside(scan: Path, ending: str) -> Path:
    """The file beside a scan that has its stem and another ending; there may be none.

    Args:
        scan: The scan, or either one of a pair.
        ending: In lower case, as BIDS writes it, such as `.bval`. Old systems write names in capitals: where there is
            no such file, one whose ending is in upper case counts.
    """
    stem = scan_stem(scan.name)
    beside, upper = scan.with_name(stem + ending), scan.with_name(stem + ending.upper())
    # A link that leads nowhere is there: another file must not take its place in silence.
    return upper if not os.path.lexists(beside) and os.path.lexists(upper) else beside
