"""The scans of a raw BIDS tree: found by their names, then verified to be readable one by one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.bids.notes import NoteList
from umbrella_data.bids.questions import ScanFacts
from umbrella_data.errors import ManifestError, ScanError, ScanReason
from umbrella_data.manifest.sample import resolve_inside, resolve_scan
from umbrella_data.modality import MODALITIES
from umbrella_data.scan.verify import verify_scan

# Folders at the top of a tree that hold no raw scans (BIDS specification, "Storage of derived datasets" and "Code").
_SKIPPED_FOLDERS = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
_SCAN_NAME = re.compile(
    r"(?P<name>(?P<subject>sub-[A-Za-z0-9]+)(?:_[A-Za-z0-9+-]+)*_(?P<suffix>[A-Za-z0-9]+))\.nii(\.gz)?"
)
# The phase and the parts of complex images are no pictures of a brain.
_OTHER_PART = re.compile(r"_part-(phase|real|imag)_")

_LINKED = "links to folders, not followed: copy them (cp -rL), or name the folder that they lead to as ROOT"

_MODALITY_OF = {
    (spec.bids_datatype, suffix): spec.name for spec in MODALITIES.values() for suffix in spec.bids_suffixes
}


@dataclass(frozen=True)
class BidsScan:
    """A scan found in a tree.

    Attributes:
        name: The file name without its extension.
        subject: Such as `sub-01`.
        modality: The canonical name.
        path: Relative to the tree (or to a folder that has it), with forward slashes.
        mask: Its brain mask, named as `path` is; None where there is none, or it is not wanted.
    """

    name: str
    subject: str
    modality: str
    path: str
    mask: str | None = None


@dataclass(frozen=True)
class BidsListing:
    """What a tree has.

    Attributes:
        scans: In the order of their paths.
        notes: What was passed over, and why, one sentence a kind.
    """

    scans: tuple[BidsScan, ...]
    notes: tuple[str, ...]


def find_scans(root: Path) -> BidsListing:
    """List the scans of the known modalities in a raw BIDS tree, without opening one.

    Raises:
        ManifestError: If there is no such folder.
    """
    if not root.is_dir():
        raise ManifestError("no such folder; from-bids needs the top folder of a BIDS tree", path=root)
    scans: dict[str, BidsScan] = {}
    notes = NoteList()
    others: Counter[str] = Counter()
    for folder, names in _walk(root, notes):
        for name in names:
            match = _SCAN_NAME.fullmatch(name)
            modality = _MODALITY_OF.get((folder.name, match["suffix"])) if match else None
            path = (folder / name).relative_to(root).as_posix()
            if match is None or modality is None or _OTHER_PART.search(name):
                others[match["suffix"] if match else "without a BIDS name"] += 1
            elif not path.startswith(f"{match['subject']}/"):
                notes.add("scans that are in the folder of another subject, left out", path)
            elif match["name"] in scans:
                notes.add("scans that stand there twice, left out", f"{path}, the same as {scans[match['name']].path}")
            else:
                scans[match["name"]] = BidsScan(match["name"], match["subject"], modality, path)
    sentences = list(notes.sentences())
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        sentences.append(f"other NIfTI files, left out: {kinds}")
    return BidsListing(tuple(scans.values()), tuple(sentences))


def keep_modalities(listing: BidsListing, modalities: Collection[str]) -> BidsListing:
    """Leave out the scans of other modalities, with a note of how many there are.

    Args:
        listing: The scans of a tree.
        modalities: Canonical names.
    """
    others = Counter(scan.modality for scan in listing.scans if scan.modality not in modalities)
    kinds = ", ".join(f"{count} {modality}" for modality, count in sorted(others.items()))
    kept = tuple(scan for scan in listing.scans if scan.modality in modalities)
    return BidsListing(kept, (*listing.notes, *([f"scans of other modalities, left out: {kinds}"] if others else [])))


def read_facts(scan: BidsScan, *, root: Path, min_frames: int = 0) -> ScanFacts:
    """Prove a scan readable, and learn what can be asked about it.

    Args:
        scan: The scan.
        root: The folder that its path is relative to, and that no file may leave.
        min_frames: Reject series that are shorter.

    Raises:
        ScanError: If the scan cannot be used.
    """
    paths, mask = _inside(scan, root)
    proof = verify_scan(paths, modality=scan.modality, min_frames=min_frames, mask=mask)
    return ScanFacts(scan.modality, num_frames=proof.num_frames, num_b0=proof.num_b0, warnings=proof.warnings)


def _walk(root: Path, notes: NoteList) -> Iterator[tuple[Path, list[str]]]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        skipped = _SKIPPED_FOLDERS if here == root else ()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in list(folders):
            if (here / name).is_symlink():
                notes.add(_LINKED, (here / name).relative_to(root).as_posix())
                folders.remove(name)
        yield here, sorted(name for name in files if name.endswith((".nii", ".nii.gz")) and not name.startswith("."))


def _inside(scan: BidsScan, root: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The files of a scan and its mask."""
    base = root.resolve()
    try:
        mask = None if scan.mask is None else resolve_inside(scan.mask, root=base)
        return resolve_scan([scan.path], modality=scan.modality, root=base), mask
    except ValueError as error:
        # The error names its file: what many scans have in common is the rest.
        words = str(error).removeprefix(f"path {scan.path!r} is ")
        raise ScanError(words, path=root / scan.path, reason=ScanReason.UNREADABLE) from error
