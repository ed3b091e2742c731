"""Files of scans: opened safely, both files of a pair, and files that belong to a scan, next to it or inherited."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import combinations
from pathlib import Path

from umbrella_data.errors import ScanError, ScanReason

_HEADER, _VOXELS = ".hdr", ".img"
_PLAIN_ENDINGS = (".nii", _HEADER, _VOXELS)
_ENDINGS = (*_PLAIN_ENDINGS, *(f"{ending}.gz" for ending in _PLAIN_ENDINGS))


@contextmanager
def open_regular_file(path: str) -> Iterator[BufferedReader]:
    """Open a file for reading; errors of the system become a `ScanError`.

    Raises:
        ScanError: `missing`, `not_regular_file` or `unreadable`; also if reading fails within the context.
    """
    try:
        # O_NONBLOCK: a FIFO under this name would block otherwise.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=path) from error
    # fdopen fails on a folder with an error of its own.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise ScanError(
                f"reading fails: {error.strerror or error}", path=path, reason=ScanReason.UNREADABLE
            ) from error


# Levels of folders above a scan in which inherited files are searched.
_MAX_LEVELS = 5
_SCAN_ENDINGS = (".nii", ".nii.gz", ".img")


def stat_regular_file(path: Path) -> os.stat_result:
    """The status of a file, without opening it; a symbolic link is followed.

    Raises:
        ScanError: As `open_regular_file`, except for missing read permission.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(str(path))
    return status


def is_lost(error: ScanError) -> bool:
    """Whether nothing at all exists under the path of an error; a broken link exists."""
    return error.reason == ScanReason.MISSING and not Path(error.path).is_symlink()


def pair_of(path: str) -> tuple[str, str] | None:
    """The `.hdr` and the `.img` file of a pair, of which `path` is one; None for any other name.

    Both are compressed (`.hdr.gz`, `.img.gz`), or neither.
    """
    name, gzip = (path[:-3], path[-3:]) if path.lower().endswith(".gz") else (path, "")
    stem, ending = name[:-4], name[-4:]
    if ending.lower() not in (_HEADER, _VOXELS):
        return None
    header, voxels = (_HEADER.upper(), _VOXELS.upper()) if ending.isupper() else (_HEADER, _VOXELS)
    # The given name keeps its spelling.
    return (path, stem + voxels + gzip) if ending.lower() == _HEADER else (stem + header + gzip, path)


def both_files(path: Path) -> tuple[Path, ...]:
    """The header and the voxels of a pair, or the one file of any other scan."""
    return tuple(map(Path, pair_of(str(path)) or (path,)))


def is_scan_name(name: str) -> bool:
    """Whether a file name has the ending of a scan, in either case."""
    return name.lower().endswith(_ENDINGS)


def scan_stem(name: str) -> str:
    """A scan's file name without its ending, in either case."""
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def sibling_file(scan: Path, ending: str) -> Path:
    """The file next to a scan that has its stem and another ending; it may not exist.

    Args:
        scan: The scan, or either file of a pair.
        ending: In lower case, as BIDS writes it, such as `.bval`. If there is no such file, one whose ending is in
            upper case is taken.
    """
    stem = scan_stem(scan.name)
    sibling, upper = scan.with_name(stem + ending), scan.with_name(stem + ending.upper())
    # A broken link exists: another file must not silently replace it.
    return upper if not os.path.lexists(sibling) and os.path.lexists(upper) else sibling


def _not_regular(path: str) -> ScanError:
    return ScanError(
        "not a regular file (a folder, a pipe, a socket or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE
    )


def _cannot_open(error: OSError | ValueError, *, path: str) -> ScanError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and Path(path).is_symlink():
        is_annex = "annex/objects/" in Path(path).readlink().as_posix()
        advice = "fetch its content (datalad get, or git annex get)" if is_annex else "copy that file, or fix the link"
        message = f"a link to a file that does not exist: {advice}"
        return ScanError(message, path=path, reason=ScanReason.MISSING)
    if number in (errno.ENOENT, errno.ENOTDIR):
        hint = "; a pair needs its .hdr and its .img, both compressed (.gz) or neither" if pair_of(path) else ""
        return ScanError(f"there is no such file{hint}", path=path, reason=ScanReason.MISSING)
    if number == errno.ENXIO:
        return _not_regular(path)
    return ScanError(f"cannot be opened: {error}", path=path, reason=ScanReason.UNREADABLE)


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
    known = re.compile(r"sub-.*(?<!dwi)|.*mask|(.*_)?(nodif|nodif_brain|grad_dev|T1w?|T2w?|FA|MD|MO|S0|[LV][123])")
    return all(known.fullmatch(stem) for stem in others)
