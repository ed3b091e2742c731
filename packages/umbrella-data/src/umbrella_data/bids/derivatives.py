"""BIDS derivatives (fMRIPrep, QSIPrep): choosing one version of each scan, and finding its brain mask.

A derivative tree has several versions of a scan: in native and template spaces, at several resolutions, before and
after processing steps. The entities `space`, `res`, `den`, `cohort` and `desc` of the file name distinguish them (BIDS
specification, "BIDS Derivatives").
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umbrella_data.bids.layout import BidsListing, BidsScan, add_counts
from umbrella_data.files.paths import scan_stem

_VERSION_ENTITIES = ("space", "res", "den", "cohort", "desc")
_PREPROCESSED = "preproc"
# Native spaces, best first: no `space` entity (the acquired grid), then those of the subject's own anatomy.
_NATIVE_SPACES = ("", "T1w", "ACPC", "orig")


def choose_versions(listing: BidsListing, *, space: str | None = None, desc: str | None = None) -> BidsListing:
    """Keep one version of each scan.

    Args:
        listing: The scans of a raw or a derivative tree.
        space: Keep only versions in this space, such as `MNI152NLin2009cAsym`. None prefers a native space, then the
            first one by name.
        desc: Keep only versions with this description, such as `preproc`. None prefers `preproc`, then no description.

    Returns:
        The listing with messages about the versions that were left out. The listing of a raw tree is unchanged.
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
    scans = tuple(sorted(kept, key=lambda scan: scan.path))
    chosen = add_counts(BidsListing(scans, listing.messages), "other versions of scans, left out", left_out)
    if num_without:
        wanted = ", ".join(f"{key}-{value}" for key, value in (("space", space), ("desc", desc)) if value is not None)
        chosen = replace(chosen, messages=(*chosen.messages, f"{num_without} scans have no version with {wanted}"))
    return chosen


def add_masks(listing: BidsListing, *, root: Path) -> BidsListing:
    """Add the brain mask of each scan that has one, see `sibling_mask`, and a message with their number."""
    found = [(scan, sibling_mask(root / scan.path)) for scan in listing.scans]
    scans = [scan if mask is None else replace(scan, mask=mask.relative_to(root).as_posix()) for scan, mask in found]
    num_masked = sum(scan.mask is not None for scan in scans)
    message = f"{num_masked} of {len(scans)} scans have a brain mask: voxels outside of it are set to 0"
    return BidsListing(tuple(scans), (*listing.messages, *([message] if num_masked else [])))


def _entities(scan: BidsScan) -> dict[str, str]:
    pairs: Sequence[tuple[str, str, str]] = [part.partition("-") for part in scan.name.split("_")[:-1]]
    return {key: value for key, _, value in pairs}


def _identity(scan: BidsScan) -> tuple[str, ...]:
    """The modality and the entities that all versions of one scan share."""
    entities = _entities(scan)
    return (scan.modality, *(f"{key}-{value}" for key, value in entities.items() if key not in _VERSION_ENTITIES))


def _version(scan: BidsScan) -> str:
    entities = _entities(scan)
    pairs = [f"{key}-{entities[key]}" for key in _VERSION_ENTITIES if key in entities]
    return "_".join(pairs) or "without space and desc"


def _fits(scan: BidsScan, key: str, wanted: str | None) -> bool:
    return wanted is None or _entities(scan).get(key) == wanted


def _rank(scan: BidsScan) -> tuple[object, ...]:
    """A sort key, best version first: preprocessed, then in a native space, then by path."""
    entities = _entities(scan)
    desc, space = entities.get("desc", ""), entities.get("space", "")
    by_space = _NATIVE_SPACES.index(space) if space in _NATIVE_SPACES else len(_NATIVE_SPACES)
    return (desc != _PREPROCESSED, desc != "", by_space, scan.path)


def sibling_mask(scan: Path) -> Path | None:
    """The brain mask next to a derivative scan, by its BIDS name; None if there is none.

    `sub-01_space-T1w_desc-preproc_bold.nii.gz` -> `sub-01_space-T1w_desc-brain_mask.nii.gz`, as fMRIPrep and QSIPrep
    name them. A raw scan, without `space` and `desc`, has none.
    """
    *entities, _ = scan_stem(scan.name).split("_")
    if not any(entity.startswith(("space-", "desc-")) for entity in entities):
        return None
    stem = "_".join([*(entity for entity in entities if not entity.startswith("desc-")), "desc-brain_mask"])
    candidates = (scan.with_name(stem + ending) for ending in (".nii.gz", ".nii"))
    return next((file for file in candidates if file.exists()), None)
