"""Scans of a BIDS tree: found by file name, then validated one by one.

BIDS suffixes such as `T1w` and their modalities are in `umbrella_data.modality.MODALITIES`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from umbrella_data.bids.messages import MessageList
from umbrella_data.bids.questions import ScanMetadata
from umbrella_data.errors import ManifestError, ScanError, ScanReason
from umbrella_data.manifest.path_safety import resolve_inside, resolve_scan
from umbrella_data.modality import MODALITIES
from umbrella_data.scan.gradient_table import B0_THRESHOLD, MAX_B
from umbrella_data.scan.verify import verify_scan

# Top-level folders without raw scans (BIDS specification, "Storage of derived datasets" and "Code").
_SKIPPED_FOLDERS = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
_SCAN_NAME = re.compile(
    r"(?P<name>(?P<subject>sub-[A-Za-z0-9]+)(?:_[A-Za-z0-9+-]+)*_(?P<suffix>[A-Za-z0-9]+))\.nii(\.gz)?"
)
# Phase images and the parts of complex images are skipped; magnitude images are read.
_OTHER_PART = re.compile(r"_part-(phase|real|imag)_")

_LINKED_FOLDERS = "links to folders, not followed: copy them (cp -rL), or give their target as ROOT"

_MODALITY_OF = {
    (spec.bids_datatype, suffix): spec.name for spec in MODALITIES.values() for suffix in spec.bids_suffixes
}


@dataclass(frozen=True)
class BidsScan:
    """A scan of a BIDS tree.

    Attributes:
        name: The file name without its extension.
        subject: The subject's label, such as `sub-01`.
        modality: The canonical name.
        path: Relative to the tree or to `data_root`, with forward slashes.
        mask: Path of its brain mask, relative as `path`; None without one.
    """

    name: str
    subject: str
    modality: str
    path: str
    mask: str | None = None

    @property
    def session(self) -> str | None:
        """The session's label, such as `ses-01`; None if the file name has none."""
        return next((part for part in self.name.split("_") if part.startswith("ses-")), None)


@dataclass(frozen=True)
class BidsListing:
    """The scans of a BIDS tree.

    Attributes:
        scans: Sorted by path.
        messages: Skipped files and the reasons, one message for each kind.
    """

    scans: tuple[BidsScan, ...]
    messages: tuple[str, ...]


def find_scans(root: Path) -> BidsListing:
    """List the scans of the known modalities in a BIDS tree by their names; no scan is opened.

    Raises:
        ManifestError: If the folder does not exist.
    """
    if not root.is_dir():
        raise ManifestError("no such folder; give the top folder of a BIDS tree", path=root)
    scans: dict[str, BidsScan] = {}
    messages = MessageList()
    others: Counter[str] = Counter()
    for folder, names in _walk(root, messages):
        for name in names:
            match = _SCAN_NAME.fullmatch(name)
            modality = _MODALITY_OF.get((folder.name, match["suffix"])) if match else None
            path = (folder / name).relative_to(root).as_posix()
            if match is None or modality is None or _OTHER_PART.search(name):
                others[match["suffix"] if match else "without a BIDS name"] += 1
            elif not path.startswith(f"{match['subject']}/"):
                messages.add("scans in the folder of another subject, left out", path)
            elif match["name"] in scans:
                messages.add("duplicate scans, left out", f"{path}, the same as {scans[match['name']].path}")
            else:
                scans[match["name"]] = BidsScan(match["name"], match["subject"], modality, path)
    return add_counts(BidsListing(tuple(scans.values()), tuple(messages)), "other NIfTI files, left out", others)


def add_counts(listing: BidsListing, kind: str, counts: Counter[str]) -> BidsListing:
    """Add a message that lists the counts of a kind of skipped files, if there are any."""
    if not counts:
        return listing
    counted = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return replace(listing, messages=(*listing.messages, f"{kind}: {counted}"))


def keep_modalities(listing: BidsListing, modalities: Collection[str]) -> BidsListing:
    """Keep the scans of these modalities (canonical names), with a message that counts the others."""
    others = Counter(scan.modality for scan in listing.scans if scan.modality not in modalities)
    kept = tuple(scan for scan in listing.scans if scan.modality in modalities)
    return add_counts(BidsListing(kept, listing.messages), "scans of other modalities, left out", others)


def read_metadata(
    scan: BidsScan,
    *,
    root: Path,
    min_frames: int = 0,
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
) -> ScanMetadata:
    """Validate a scan in full, and return its metadata for questions.

    Args:
        scan: The scan.
        root: Folder that its path is relative to; no file may be outside of it.
        min_frames: Reject series with fewer frames.
        max_b: Largest b-value that the tensor of a DWI is fitted on, in s/mm2.
        b0_threshold: Largest b-value of a b0 volume of a DWI, in s/mm2.

    Raises:
        ScanError: If the scan cannot be used.
    """
    paths, mask = _resolve(scan, root)
    found = verify_scan(
        paths, modality=scan.modality, min_frames=min_frames, mask=mask, max_b=max_b, b0_threshold=b0_threshold
    )
    return ScanMetadata(scan.modality, num_frames=found.num_frames, num_b0=found.num_b0, warnings=found.warnings)


def _walk(root: Path, messages: MessageList) -> Iterator[tuple[Path, list[str]]]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        skipped = _SKIPPED_FOLDERS if here == root else ()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in list(folders):
            if (here / name).is_symlink():
                messages.add(_LINKED_FOLDERS, (here / name).relative_to(root).as_posix())
                folders.remove(name)
        yield here, sorted(name for name in files if name.endswith((".nii", ".nii.gz")) and not name.startswith("."))


def _resolve(scan: BidsScan, root: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The files of a scan, and its mask; a `ScanError` if one is outside of the root."""
    base = root.resolve()
    try:
        mask = None if scan.mask is None else resolve_inside(scan.mask, root=base)
        return resolve_scan([scan.path], modality=scan.modality, root=base), mask
    except ValueError as error:
        # Without the file's name, which the ScanError has, so that equal problems have equal messages.
        message = str(error).removeprefix(f"path {scan.path!r} is ")
        raise ScanError(message, path=root / scan.path, reason=ScanReason.UNREADABLE) from error
