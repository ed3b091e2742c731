"""NIfTI pairs: a header in `.hdr` and its voxels in `.img`, which are one scan under either name."""

from __future__ import annotations

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
