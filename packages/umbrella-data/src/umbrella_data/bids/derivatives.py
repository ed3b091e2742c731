"""One version of each scan out of several, as fMRIPrep and QSIPrep write them: by space and description.

Such a tree has a scan in the scanner's space and in templates, at several resolutions, before and after steps. The
entities `space`, `res`, `den`, `cohort` and `desc` of a file's name tell these versions of one scan apart (BIDS
specification, "BIDS Derivatives").
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umbrella_data.bids.layout import BidsListing, BidsScan
from umbrella_data.files.paths import scan_stem

_VERSION_ENTITIES = ("space", "res", "den", "cohort", "desc")
_PREPROCESSED = "preproc"
# What a scan without `space` is in: the grid that it was acquired on, or the subject's own anatomy.
_OWN_SPACES = ("", "T1w", "ACPC", "orig")


def choose_versions(listing: BidsListing, *, space: str | None = None, desc: str | None = None) -> BidsListing:
    """Keep one version of each scan.

    Args:
        listing: The scans of a tree, raw or derived.
        space: Such as `MNI152NLin2009cAsym`: versions in other spaces are left out. None takes the subject's own space,
            and where there is none, the first one by name.
        desc: Such as `preproc`: others are left out. None prefers `preproc`, then no description.

    Returns:
        The listing with a note for what was left out. A raw tree comes back as it was.
    """
    versions: dict[tuple[str, ...], list[BidsScan]] = defaultdict(list)
    for scan in listing.scans:
        versions[_identity(scan)].append(scan)
    kept: list[BidsScan] = []
    left_out: Counter[str] = Counter()
    num_without = 0
    for candidates in versions.values():
        fitting = [scan for scan in candidates if _fits(scan, "space", space) and _fits(scan, "desc", desc)]
        num_without += not fitting
        if fitting:
            kept.append(min(fitting, key=_rank))
        left_out.update(_version(scan) for scan in candidates if scan not in kept[-1:])
    notes = list(listing.notes)
    if left_out:
        kinds = ", ".join(f"{count} {version}" for version, count in sorted(left_out.items()))
        notes.append(f"other versions of scans, left out: {kinds}")
    if num_without:
        wanted = ", ".join(f"{key}-{value}" for key, value in (("space", space), ("desc", desc)) if value is not None)
        notes.append(f"{num_without} scans have no version with {wanted}")
    return BidsListing(tuple(sorted(kept, key=lambda scan: scan.path)), tuple(notes))


def add_masks(listing: BidsListing, *, root: Path) -> BidsListing:
    """Give each scan the brain mask that is next to it: see `sibling_mask`.

    Returns:
        The listing with a note of how many have one.
    """
    found = [(scan, sibling_mask(root / scan.path)) for scan in listing.scans]
    scans = [scan if mask is None else replace(scan, mask=mask.relative_to(root).as_posix()) for scan, mask in found]
    num_masked = sum(scan.mask is not None for scan in scans)
    note = f"{num_masked} of {len(scans)} scans have a brain mask next to them: all outside of it is set to 0"
    return BidsListing(tuple(scans), (*listing.notes, *([note] if num_masked else [])))


def _entities(scan: BidsScan) -> dict[str, str]:
    pairs: Sequence[tuple[str, str, str]] = [part.partition("-") for part in scan.name.split("_")[:-1]]
    return {key: value for key, _, value in pairs}


def _identity(scan: BidsScan) -> tuple[str, ...]:
    """What all versions of one scan share."""
    entities = _entities(scan)
    return (scan.modality, *(f"{key}-{value}" for key, value in entities.items() if key not in _VERSION_ENTITIES))


def _version(scan: BidsScan) -> str:
    entities = _entities(scan)
    words = [f"{key}-{entities[key]}" for key in _VERSION_ENTITIES if key in entities]
    return "_".join(words) or "without space and desc"


def _fits(scan: BidsScan, key: str, wanted: str | None) -> bool:
    return wanted is None or _entities(scan).get(key) == wanted


def _rank(scan: BidsScan) -> tuple[object, ...]:
    """Smaller is better: preprocessed, in the subject's own space, of the first name."""
    entities = _entities(scan)
    desc, space = entities.get("desc", ""), entities.get("space", "")
    by_space = _OWN_SPACES.index(space) if space in _OWN_SPACES else len(_OWN_SPACES)
    return (desc != _PREPROCESSED, desc != "", by_space, scan.path)


def sibling_mask(scan: Path) -> Path | None:
    """The brain mask of a derivative by its BIDS name, or None if there is none.

    `sub-01_space-T1w_desc-preproc_bold.nii.gz` -> `sub-01_space-T1w_desc-brain_mask.nii.gz`, as fMRIPrep and QSIPrep
    write them; a raw scan, with neither `space` nor `desc`, has none.
    """
    *entities, _ = scan_stem(scan.name).split("_")
    if not any(entity.startswith(("space-", "desc-")) for entity in entities):
        return None
    stem = "_".join([*(entity for entity in entities if not entity.startswith("desc-")), "desc-brain_mask"])
    candidates = (scan.with_name(stem + ending) for ending in (".nii.gz", ".nii"))
    return next((file for file in candidates if file.exists()), None)
