"""The files with the labels of a BIDS tree: tables of participants and of visits, and the JSON files next to them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.path_safety import resolve_inside

_OWN_TABLE = "participants.tsv"


@dataclass(frozen=True)
class TableFiles:
    """A table and the files that describe its columns.

    Attributes:
        path: The table.
        descriptions: JSON files, the one that takes precedence first.
        subject: The subject of a table of visits, `sub-01_sessions.tsv`; None for a table of participants.
    """

    path: Path
    descriptions: tuple[Path, ...] = ()
    subject: str | None = None


def find_label_files(
    given: Sequence[Path], *, tree: Path, base: Path, subjects: Iterable[str], are_needed: bool
) -> list[list[TableFiles]]:
    """The given tables, or the tree's own, and the tables of visits of the tree and of the folders of these tables.

    Args:
        given: Tables of participants; they may be anywhere.
        tree: Top folder of the BIDS tree.
        base: The `data_root`, which the tree is in.
        subjects: Whose tables of visits are read.
        are_needed: Whether it is an error if there is no table.

    Returns:
        Groups of files whose columns are the same: each table of participants, and all tables of visits of a folder.

    Raises:
        ManifestError: If there is no table and one is needed; if a file that was not given is a link out of
            `data_root`, or out of its folder if that is elsewhere.
    """
    own = tree / _OWN_TABLE
    if not given and os.path.lexists(own):
        _check_link(own, top=tree, base=base, advice=", or give the table (--participants)")
        given = [own]
    groups = [[table_files(path, base=base)] for path in given]
    folders = {folder.resolve(): folder for folder in (*(path.parent for path in given), tree)}
    names = sorted(set(subjects))
    for folder in folders.values():
        groups.append([files for name in names if (files := _visits_of(name, folder=folder, base=base))])
    found = [group for group in groups if group]
    if are_needed and not found:
        raise ManifestError("no such file; give a table of participants (--participants)", path=own)
    return found


def table_files(path: Path, *, base: Path) -> TableFiles:
    """A table of participants with its JSON file, `participants.json` for `participants.tsv`, if there is one."""
    return TableFiles(path, _existing([path.with_suffix(".json")], top=path.parent, base=base))


def _visits_of(subject: str, *, folder: Path, base: Path) -> TableFiles | None:
    table = folder / subject / f"{subject}_sessions.tsv"
    # A broken link exists: reading it is an error, and no label is missing silently.
    if not os.path.lexists(table):
        return None
    _check_link(table, top=folder, base=base)
    described = (table.with_suffix(".json"), folder / "sessions.json", folder / "participants.json")
    return TableFiles(table, _existing(described, top=folder, base=base), subject)


def _existing(paths: Iterable[Path], *, top: Path, base: Path) -> tuple[Path, ...]:
    found = tuple(path for path in paths if os.path.lexists(path))
    for path in found:
        _check_link(path, top=top, base=base)
    return found


def _check_link(path: Path, *, top: Path, base: Path, advice: str = "") -> None:
    """Messages quote a table: one that the user did not choose must be inside of `data_root`, as scans must.

    If its folder `top` is elsewhere, next to a table that the user chose, the file must be inside of this folder.
    """
    folder, root = top.resolve(), base.resolve()
    root = root if folder.is_relative_to(root) else folder
    try:
        resolve_inside((folder / path.relative_to(top)).relative_to(root).as_posix(), root=root)
    except ValueError as error:
        raise ManifestError(f"{error}{advice}", path=path) from error
