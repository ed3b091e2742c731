"""Paths of a manifest, resolved under its data root: no scan, sidecar or mask may be outside of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from umbrella_data.files.paths import gradient_file, pair_of, sibling_file
from umbrella_data.modality import find_modality


def resolve_inside(text: str, *, root: Path) -> Path:
    """Resolve a path of a manifest under its data root.

    Args:
        text: A relative path with forward slashes.
        root: The data root, resolved; the path must be inside of it, symbolic links resolved.

    Raises:
        ValueError: For an absolute path, `..`, unprintable characters, or a link that leads out of the root.
    """
    if not text or text != text.strip() or not text.isprintable() or "\\" in text:
        raise ValueError(f"path {text!r} is empty, or has blanks at its ends, control characters or backslashes")
    if text.startswith(("/", "~")) or (len(text) > 1 and text[1] == ":"):
        raise ValueError(f"path {text!r} is absolute; make it relative to {root}, or give a data_root that contains it")
    if ".." in text.split("/"):
        raise ValueError(f"path {text!r} has '..'; write a path inside of {root}")
    _check_inside(root / text, text, root=root)
    return root / text


def resolve_file(text: str, *, root: Path) -> Path:
    """Resolve a file as `resolve_inside`; of a `.hdr`/`.img` pair, check both files and return the `.img`."""
    *_, path = [resolve_inside(part, root=root) for part in pair_of(text) or (text,)]
    return path


def resolve_scan(texts: Sequence[str], *, modality: str, root: Path) -> tuple[Path, ...]:
    """Resolve the files of one scan as `resolve_inside`, and check the files that are read with it.

    Args:
        texts: Relative paths: one file, or the maps of the scan.
        modality: The canonical name.
        root: The data root, resolved.

    Raises:
        ValueError: As `resolve_inside`, also for the bval and bvec of a DWI and the JSON sidecar of a series.
    """
    paths = tuple(resolve_file(text, root=root) for text in texts)
    spec = find_modality(modality)
    others = [sibling_file(paths[0], ".json")] if spec.is_series else []
    if spec.num_channels > 1 and len(paths) == 1:
        others = [gradient_file(paths[0], ending) for ending in (".bval", ".bvec")]
    for file in others:
        # A root within a BIDS tree inherits files from above it; when they are read, they must be in that tree.
        if file.is_relative_to(root):
            _check_inside(file, file.relative_to(root).as_posix(), root=root)
    return paths


def _check_inside(path: Path, text: str, *, root: Path) -> None:
    base, real = os.fspath(root), os.path.realpath(path)
    # Strings are compared, which is faster than with Path: this runs for every scan that is read.
    if real != base and not real.startswith(base.rstrip(os.sep) + os.sep):
        raise ValueError(f"path {text!r} is a link that leads out of {root}; copy the file, or give a data_root "
                         "that contains both (--data-root)")  # fmt: skip
