"""Scans of a BIDS tree: found by file name, then validated one by one.

BIDS suffixes such as `T1w` and their modalities are in `umbrella_data.modality.MODALITIES`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from umbrella_data.errors import ManifestError, ScanError, ScanReason
from umbrella_data.manifest.path_safety import resolve_inside, resolve_scan
from umbrella_data.modality import MODALITIES
from umbrella_data.scan.verify import VerifiedScan, verify_scan

# Top-level folders without raw scans (BIDS specification, "Storage of derived datasets" and "Code").
_SKIPPED_FOLDERS = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
_SCAN_NAME = re.compile(
    r"(?P<name>(?P<subject>sub-[A-Za-z0-9]+)(?:_[A-Za-z0-9+-]+)*_(?P<suffix>[A-Za-z0-9]+))(?i:\.nii(?:\.gz)?)"
)
# Phase images and the parts of complex images are skipped; magnitude images are read.
_OTHER_PARTS = ("phase", "real", "imag")

_MAX_NAMED = 5
_LINKED_FOLDERS = "links to folders, not followed: copy them (cp -rL), or give their target as ROOT"

_MODALITY_OF = {
    (spec.bids_datatype, suffix): spec.name for spec in MODALITIES.values() for suffix in spec.bids_suffixes
}
# Ready maps, the channels of a modality, by folder and `*_FA` or `*_param-fa_dwimap`.
_MAPS = {
    (spec.bids_datatype, channel.lower()): (spec.name, index)
    for spec in MODALITIES.values()
    if spec.num_channels > 1
    for index, channel in enumerate(spec.channels)
}


@dataclass(frozen=True)
class BidsScan:
    """A scan of a BIDS tree.

    Attributes:
        name: The file name without its extension.
        subject: The subject's label, such as `sub-01`.
        modality: The canonical name.
        paths: Its file, or its maps in the order of the modality's channels; relative to the tree or to `data_root`,
            with forward slashes.
        mask: Path of its brain mask, relative as `paths`; None without one.
    """

    name: str
    subject: str
    modality: str
    paths: tuple[str, ...]
    mask: str | None = None

    @property
    def session(self) -> str | None:
        """The session's label, such as `ses-01`; None if the file name has none."""
        label = self.entities.get("ses")
        return None if label is None else f"ses-{label}"

    @property
    def path(self) -> str:
        """Its first file."""
        return self.paths[0]

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, with the mask last."""
        return self.paths if self.mask is None else (*self.paths, self.mask)

    @property
    def entities(self) -> dict[str, str]:
        """Labels by entity, such as `{"sub": "01", "task": "rest"}`."""
        return parse_entities(self.name)

    @property
    def suffix(self) -> str:
        """The last word of the name, such as `T1w`."""
        return self.name.rpartition("_")[2]

    @property
    def datatype(self) -> str:
        """The folder of its file, such as `anat`."""
        return PurePosixPath(self.path).parent.name


@dataclass(frozen=True)
class BidsListing:
    """The scans of a BIDS tree.

    Attributes:
        scans: Sorted by path.
        messages: Skipped files and the reasons, one message for each kind.
    """

    scans: tuple[BidsScan, ...]
    messages: tuple[str, ...]

    def leave_out(self, reason: Callable[[BidsScan], tuple[str, str] | None]) -> BidsListing:
        """Leave out the scans with a reason: the kind of a message, and the name that it counts the scan under."""
        kept: list[BidsScan] = []
        left_out: dict[str, Counter[str]] = defaultdict(Counter)
        for scan in self.scans:
            if (found := reason(scan)) is None:
                kept.append(scan)
            else:
                left_out[found[0]][found[1]] += 1
        listing = replace(self, scans=tuple(kept))
        for kind, counts in left_out.items():
            listing = listing.count(kind, counts)
        return listing

    def count(self, kind: str, counts: Counter[str]) -> BidsListing:
        """Add a message that lists the counts of a kind of skipped files, if there are any."""
        counted = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        return self.say(f"{kind}: {counted}") if counts else self

    def say(self, *messages: str) -> BidsListing:
        """Add messages."""
        return replace(self, messages=(*self.messages, *messages))


class MessageList:
    """Skipped items, grouped by kind: in a tree of a thousand subjects, a thousand may be of one kind."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, item: str) -> None:
        """Add an item, such as a path, to a kind, such as `links to folders, not followed`."""
        self._items[kind].append(item)

    def __iter__(self) -> Iterator[str]:
        """One message for each kind, in the order of their first items."""
        return (f"{kind}: {len(items):,} ({first_of(items)})" for kind, items in self._items.items())


def first_of(items: Sequence[str]) -> str:
    """The first five items, and how many more there are."""
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def parse_entities(name: str) -> dict[str, str]:
    """The labels by entity of a BIDS file name."""
    pairs = (part.partition("-") for part in name.split("_")[:-1])
    return {key: label for key, _, label in pairs}


def find_map(name: str, datatype: str) -> tuple[str, int] | None:
    """The modality and the number of the channel of a ready map; None for any other scan.

    Args:
        name: The file name without its extension: its suffix is a channel, as in `sub-01_FA`, or `dwimap` with the
            channel as `param`, as in `sub-01_model-tensor_param-fa_dwimap`.
        datatype: The folder.
    """
    suffix = name.rpartition("_")[2]
    channel = parse_entities(name).get("param", "") if suffix == f"{datatype}map" else suffix
    return None if (datatype, suffix) in _MODALITY_OF else _MAPS.get((datatype, channel.lower()))


def find_scans(root: Path) -> BidsListing:
    """List the scans of the known modalities in a BIDS tree by their names; no scan is opened.

    Each ready map, such as FA, is a scan of its own here, see `umbrella_data.bids.derivatives.join_maps`.

    Raises:
        ManifestError: If the folder does not exist.
    """
    if not root.is_dir():
        raise ManifestError("no such folder; give the top folder of a BIDS tree", path=root)
    scans: dict[str, BidsScan] = {}
    messages = MessageList()
    others: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for folder, names in _walk(root, messages):
        for name in names:
            match = _SCAN_NAME.fullmatch(name)
            modality = _find_modality(match, folder.name) if match else None
            path = (folder / name).relative_to(root).as_posix()
            if match is None or modality is None:
                others[match["suffix"] if match else "without a BIDS name"] += 1
            elif (part := parse_entities(match["name"]).get("part")) in _OTHER_PARTS:
                parts[f"part-{part}"] += 1
            elif not path.startswith(f"{match['subject']}/"):
                messages.add("scans in the folder of another subject, left out", path)
            elif match["name"] in scans:
                messages.add("duplicate scans, left out", f"{path}, the same as {scans[match['name']].path}")
            else:
                scans[match["name"]] = BidsScan(match["name"], match["subject"], modality, (path,))
    listing = BidsListing(tuple(scans.values()), tuple(messages)).count("other NIfTI files, left out", others)
    return listing.count("phase, real and imaginary parts, left out", parts)


def _find_modality(match: re.Match[str], datatype: str) -> str | None:
    found = find_map(match["name"], datatype)
    return _MODALITY_OF.get((datatype, match["suffix"])) if found is None else found[0]


def read_metadata(scan: BidsScan, *, root: Path, **options: Any) -> VerifiedScan:
    """Validate a scan in full, and return its metadata.

    Args:
        scan: The scan.
        root: Folder that its path is relative to; no file may be outside of it.
        **options: Other arguments of `umbrella_data.scan.verify.verify_scan`, such as `min_frames`.

    Raises:
        ScanError: If the scan cannot be used.
    """
    base = root.resolve()
    try:
        mask = None if scan.mask is None else resolve_inside(scan.mask, root=base)
        paths = resolve_scan(scan.paths, modality=scan.modality, root=base)
    except ValueError as error:
        # Without the file's name, which the ScanError has, so that equal problems have equal messages.
        message = str(error).removeprefix(f"path {scan.path!r} is ")
        raise ScanError(message, path=root / scan.path, reason=ScanReason.UNREADABLE) from error
    return verify_scan(paths, modality=scan.modality, mask=mask, **options)


def _walk(root: Path, messages: MessageList) -> Iterator[tuple[Path, list[str]]]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        skipped = _SKIPPED_FOLDERS if here == root else ()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in list(folders):
            if (here / name).is_symlink():
                messages.add(_LINKED_FOLDERS, (here / name).relative_to(root).as_posix())
                folders.remove(name)
        scans = (name for name in files if name.lower().endswith((".nii", ".nii.gz")) and not name.startswith("."))
        yield here, sorted(scans)
