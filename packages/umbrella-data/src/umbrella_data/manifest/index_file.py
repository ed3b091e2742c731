"""The saved index of a manifest: row offsets and columns in one file, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbrella_data.files.mapped_arrays import Arrays, DamagedArraysError, MappedArrays, write_arrays
from umbrella_data.manifest.row_columns import Combinations

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Increased when the format changes, so that old indexes are built again."""

SAVE_FROM_ROWS = 20_000
"""Indexes of smaller manifests are not saved: they are built quickly."""


def open_index(path: Path, *, kind: str = "index", index_dir: Path | None) -> MappedArrays | None:
    """Map the saved index of a manifest; None if there is none of its present content.

    Args:
        path: The manifest.
        kind: `index` for offsets and columns, or the name of another index, such as token lengths.
        index_dir: Folder of the indexes; None looks next to the manifest, then in the user's cache.
    """
    for place in _places(path, kind, index_dir):
        try:
            saved = MappedArrays(place)
        except (OSError, DamagedArraysError):
            continue
        if saved.facts.get("version") == INDEX_VERSION and _is_same(path, saved.facts["manifest"]):
            return saved
    return None


def save_index(
    path: Path, arrays: Arrays, *, kind: str = "index", combinations: Combinations, index_dir: Path | None
) -> MappedArrays | None:
    """Save an index and map it; None if no folder is writable.

    Args:
        path: The manifest.
        arrays: One entry for each row.
        kind: As for `open_index`.
        combinations: See `RowFacts`.
        index_dir: Folder of the indexes; None writes next to the manifest, or else to the user's cache.
    """
    status = path.stat()
    identity = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": _hash(path)}
    facts = {"version": INDEX_VERSION, "manifest": identity, "combinations": combinations}
    for place in _places(path, kind, index_dir):
        try:
            write_arrays(place, arrays, facts=facts)
        except OSError as error:
            logger.info("the index of %s is not saved at %s: %s", path, place, error)
            continue
        return MappedArrays(place)
    return None


def cache_home() -> Path:
    """The user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umbrella-data"


def _places(path: Path, kind: str, index_dir: Path | None) -> list[Path]:
    name = f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.{kind}"
    if index_dir is not None:
        return [index_dir / name]
    return [path.with_name(f".{path.name}.{kind}"), cache_home() / "indexes" / name]


def _is_same(path: Path, identity: Mapping[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != identity["size"]:
        return False
    # A copy has another time and the same content.
    return status.st_mtime_ns == identity["mtime_ns"] or _hash(path) == identity["sha256"]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
