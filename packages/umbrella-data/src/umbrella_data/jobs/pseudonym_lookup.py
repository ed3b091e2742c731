"""From a hash in a file of a command or a run to the subject, scan or manifest that it is the pseudonym of."""

from __future__ import annotations

import json
from pathlib import Path

from umbrella_data.errors import UmbrellaDataError
from umbrella_data.privacy import HASH_LENGTH, TABLE_NAME

_MIN_LENGTH = 4


class UnknownHashError(UmbrellaDataError):
    """No name has the hash, or several have."""


def folders_with_names(top: Path) -> list[Path]:
    """Folders with a table of names: `top`, those in it and those in its `runs`, the newest first."""
    tables = [path for pattern in ("", "*/", "runs/*/") for path in top.glob(f"{pattern}{TABLE_NAME}")]
    return [path.parent for path in sorted(tables, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def who_is(hash_text: str, *, folders: list[Path]) -> tuple[str, Path]:
    """Find a name by its hash.

    Args:
        hash_text: The hash, or its first digits if they are unique in a folder.
        folders: Folders whose files may have the hash, searched in this order.

    Returns:
        The subject, or the path of the scan or manifest; and the folder whose table has it.

    Raises:
        UnknownHashError: If it is no hash, or no table has it, or several names in one table start with it.
    """
    wanted = hash_text.lower()
    if not _MIN_LENGTH <= len(wanted) <= HASH_LENGTH or set(wanted) - set("0123456789abcdef"):
        raise UnknownHashError(
            f"{hash_text!r} is not a hash: hashes have {HASH_LENGTH} hexadecimal digits; give {_MIN_LENGTH} or more"
        )
    for folder in folders:
        found = _names(folder / TABLE_NAME, wanted)
        if len(found) > 1:
            raise UnknownHashError(f"{folder / TABLE_NAME}: {hash_text} starts {len(found)} hashes; give more digits")
        if found:
            return found.pop(), folder
    searched = ", ".join(str(folder / TABLE_NAME) for folder in folders) or f"no folder with a {TABLE_NAME} found"
    raise UnknownHashError(f"{hash_text} is in no table of names ({searched}); name the folder with --in")


def _names(table: Path, wanted: str) -> set[str]:
    """The names of a table whose hashes start with some digits; a line cut off by a crash is skipped."""
    found = set()
    if table.is_file():
        with table.open("rb") as file:
            for line in file:
                try:
                    pseudonym, name = json.loads(line)
                except (ValueError, TypeError):
                    continue
                if str(pseudonym).startswith(wanted):
                    found.add(str(name))
    return found
