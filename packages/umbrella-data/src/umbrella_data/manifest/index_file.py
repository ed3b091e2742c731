"""The index of a manifest on disk: offsets and facts of its rows, mapped by every process that reads it."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from umbrella_data.files.mapped_arrays import Arrays, DamagedArraysError, MappedArrays, write_arrays
from umbrella_data.manifest.row_columns import Combinations

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Raised whenever an index would hold something else, so that old ones are made again."""

SAVE_FROM_ROWS = 20_000
"""Smaller manifests are indexed in less time than it takes to wonder about a file next to them."""

Identity = dict[str, Any]


def open_index(path: Path, *, kind: str = "index", index_dir: Path | None) -> MappedArrays | None:
    """What was saved about the rows of a manifest, or None where nothing belongs to its present content.

    Args:
        path: The manifest.
        kind: `index` for offsets and facts, or another name for something else about the rows.
        index_dir: Where indexes are kept; None looks next to the manifest, then in the user's cache.
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
    """Save what is known about the rows, and return it as it is mapped; None where no place can be written to.

    Args:
        path: The manifest.
        arrays: One entry a row.
        kind: As for `open_index`.
        combinations: What the codes among the arrays stand for.
        index_dir: Where indexes are kept; None writes next to the manifest, else to the user's cache.
    """
    known = {"version": INDEX_VERSION, "manifest": identify(path), "combinations": combinations}
    for place in _places(path, kind, index_dir):
        try:
            write_arrays(place, arrays, facts=known)
        except OSError as error:
            logger.info("the index of %s is not kept at %s: %s", path, place, error)
            continue
        return MappedArrays(place)
    return None


def identify(path: Path) -> Identity:
    """What tells one content of a file from another."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": _hash(path)}


def cache_home() -> Path:
    """The user's folder for what can be made again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umbrella-data"


def _places(path: Path, kind: str, index_dir: Path | None) -> list[Path]:
    name = f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.{kind}"
    if index_dir is not None:
        return [index_dir / name]
    return [path.with_name(f".{path.name}.{kind}"), cache_home() / "indexes" / name]


def _is_same(path: Path, identity: Identity) -> bool:
    status = path.stat()
    if status.st_size != identity["size"]:
        return False
    # A copy has another time but the same content.
    return status.st_mtime_ns == identity["mtime_ns"] or _hash(path) == identity["sha256"]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
