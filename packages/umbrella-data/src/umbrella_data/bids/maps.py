"""Ready FA and MD maps of a BIDS tree: two files with the same entities are one dMRI scan.

They are named `sub-01_FA.nii.gz`, or `sub-01_model-tensor_param-fa_dwimap.nii.gz` as QSIRecon writes them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from umbrella_data.bids.layout import BidsListing, BidsScan, MessageList, find_map
from umbrella_data.modality import find_modality

VERSION_ENTITIES = ("space", "res", "den", "cohort", "desc", "model")
"""Entities that distinguish the versions of one scan: its grid, its processing and the model of its maps."""


def join_maps(listing: BidsListing) -> BidsListing:
    """Join the maps of each scan, in the order of the modality's channels; incomplete ones are listed and left out.

    Args:
        listing: Scans of one file, as `find_scans` returns them.
    """
    scans: list[BidsScan] = []
    groups: dict[tuple[str, ...], dict[int, BidsScan]] = defaultdict(dict)
    messages = MessageList()
    for scan in listing.scans:
        found = find_map(scan.name, scan.datatype)
        if found is None:
            scans.append(scan)
        elif (same := groups[_identity(scan)].setdefault(found[1], scan)) is not scan:
            messages.add("duplicate maps, left out", f"{scan.path}, the same as {same.path}")
    for maps in groups.values():
        first = next(iter(maps.values()))
        channels = find_modality(first.modality).channels
        if len(maps) == len(channels):
            scans.append(replace(maps[0], paths=tuple(maps[index].path for index in range(len(channels)))))
            continue
        kind = f"{first.modality} maps without the others of {', '.join(channels)}, left out"
        for scan in maps.values():
            messages.add(kind, scan.path)
    ordered = tuple(sorted(scans, key=lambda scan: scan.path))
    return replace(listing, scans=ordered).say(*messages)


def prefer_maps(listing: BidsListing) -> BidsListing:
    """Leave out each series with ready maps: those whose entities it has all, apart from space, desc and model."""
    ready: dict[tuple[str, str], list[frozenset[tuple[str, str]]]] = defaultdict(list)
    for scan in listing.scans:
        if len(scan.paths) > 1:
            ready[scan.subject, scan.modality].append(scan_entities(scan))

    def reason(scan: BidsScan) -> tuple[str, str] | None:
        entities = scan_entities(scan)
        has_maps = len(scan.paths) == 1 and any(maps <= entities for maps in ready[scan.subject, scan.modality])
        return ("series with ready maps, left out", scan.suffix) if has_maps else None

    return listing.leave_out(reason)


def scan_entities(scan: BidsScan) -> frozenset[tuple[str, str]]:
    """The entities that all versions of one scan share; maps of one scan differ in `param`."""
    return frozenset((key, label) for key, label in scan.entities.items() if key not in (*VERSION_ENTITIES, "param"))


def _identity(scan: BidsScan) -> tuple[str, ...]:
    """What all maps of one scan share; `FA` and `MD` are the suffix, or the label of `param`."""
    folder = scan.path.rpartition("/")[0]
    is_param = scan.suffix == f"{scan.datatype}map"
    entities = (f"{key}-{label}" for key, label in scan.entities.items() if key != "param")
    return (scan.modality, folder, str(is_param), *entities)
