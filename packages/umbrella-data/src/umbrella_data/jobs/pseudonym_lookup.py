"""From a hash that a command or a run wrote back to the subject or file that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from umbrella_data.errors import ManifestError, UmbrellaDataError
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.privacy import HASH_LENGTH, SALT_NAME, name_hasher, read_or_create_salt

_MIN_LENGTH = 4


class UnknownHashError(UmbrellaDataError):
    """No name has the hash, or more than one."""


class NameNotFoundError(UnknownHashError):
    """No name has the hash."""


def salted_folders(top: Path) -> list[Path]:
    """Folders whose files name subjects by hashes: `top`, those in it and those in its `runs`, the newest first."""
    salts = [salt for pattern in ("", "*/", "runs/*/") for salt in top.glob(f"{pattern}{SALT_NAME}") if salt.is_file()]
    # A salt is made with its folder, and never written again.
    return [salt.parent for salt in sorted(salts, key=lambda salt: salt.stat().st_mtime_ns, reverse=True)]


def who_is(hash_text: str, *, folder: Path, manifests: Iterable[Manifest]) -> str:
    """Find a name by its hash.

    Args:
        hash_text: The hash, or its beginning if that tells it apart.
        folder: The folder whose files hold the hash, with its salt; or the salt itself.
        manifests: Where to look: at their own paths, at their subjects and at their scans.

    Returns:
        The subject, or the path of the scan or manifest.

    Raises:
        NameNotFoundError: Where no name has that hash.
        UnknownHashError: Where several begin with it, or it is none.
        ManifestError: Where there is no salt.
    """
    salt = folder / SALT_NAME if folder.is_dir() else folder
    if not salt.is_file():
        raise ManifestError(f"no salt; give the folder of the run or report that holds {hash_text}", path=salt)
    wanted = hash_text.lower()
    if not _MIN_LENGTH <= len(wanted) <= HASH_LENGTH or set(wanted) - set("0123456789abcdef"):
        raise UnknownHashError(f"{hash_text!r} is no hash: those have {HASH_LENGTH} hexadecimal digits, of which the "
                               f"first {_MIN_LENGTH} or more are needed")  # fmt: skip
    name_hash = name_hasher(read_or_create_salt(salt))
    found = {name for name in _names(manifests) if name_hash(name).startswith(wanted)}
    if not found:
        raise NameNotFoundError(f"no subject, scan or manifest has the hash {hash_text} with the salt of {salt}; "
                                "give the manifests that the run used")  # fmt: skip
    if len(found) > 1:
        raise UnknownHashError(f"{len(found)} names have hashes that begin with {hash_text} with the salt of {salt}; "
                               "give more digits")  # fmt: skip
    return found.pop()


def _names(manifests: Iterable[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        yield str(manifest.path)
        for row in range(len(manifest)):
            try:
                sample = manifest[row]
            except ManifestError:
                continue
            yield sample.subject
            yield sample.id
            yield from (str(path) for scan in sample.scans for path in scan.files)
