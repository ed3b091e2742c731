"""Choosing one of several images of a scan, joining its ready maps, and finding its brain mask.

One run may have several echoes, reconstructions (`rec`) and parts (`part-mag`). A derivative tree (fMRIPrep, QSIPrep)
has several versions of a scan: in native and template spaces, at several resolutions, before and after processing
steps. The entities `space`, `res`, `den`, `cohort` and `desc` of the file name distinguish them (BIDS specification,
"BIDS Derivatives"), and `model` those of ready maps.

Ready FA and MD maps with the same entities are one dMRI scan. They are named `sub-01_FA.nii.gz`, or
`sub-01_model-tensor_param-fa_dwimap.nii.gz` as QSIRecon writes them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from umbrella_data.bids.layout import BidsListing, BidsScan, MessageList, find_map
from umbrella_data.files.paths import scan_stem
from umbrella_data.modality import find_modality

# Entities that distinguish the versions of one scan: its grid, its processing and the model of its maps.
_VERSION_ENTITIES = ("space", "res", "den", "cohort", "desc", "model")
# Of several images of one scan, one without the entity is used, otherwise one by rule.
_VARIANTS = {
    "rec": "other reconstructions of the same scan, left out (--reconstruction chooses one)",
    "part": "other parts of the same scan, left out",
    "echo": "other echoes of the same run, left out (--echo chooses one)",
}
_PREPROCESSED = "preproc"
_TENSOR_MODELS = ("", "tensor", "dti")
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
        The listing with messages about the versions that were left out. Of several reconstructions, parts or echoes of
        one scan, the one without this entity is kept, otherwise the first reconstruction by name, and the middle echo:
        the second of three, the second of four.
    """
    versions: dict[tuple[object, ...], list[BidsScan]] = defaultdict(list)
    for scan in listing.scans:
        versions[_identity(scan)].append(scan)
    kept: list[BidsScan] = []
    left_out: Counter[str] = Counter()
    variants = {key: Counter[str]() for key in _VARIANTS}
    num_without = 0
    for candidates in versions.values():
        fitting = [scan for scan in candidates if _fits(scan, "space", space) and _fits(scan, "desc", desc)]
        left_out.update(_version(scan) for scan in candidates if scan not in fitting)
        if not fitting:
            num_without += 1
            continue
        for key, counts in variants.items():
            label = _choose_label(key, {scan.entities.get(key) for scan in fitting})
            counts.update(f"{key}-{scan.entities[key]}" for scan in fitting if scan.entities.get(key) != label)
            fitting = [scan for scan in fitting if scan.entities.get(key) == label]
        kept.append(min(fitting, key=_rank))
        left_out.update(_version(scan) for scan in fitting if scan is not kept[-1])
    scans = tuple(sorted(kept, key=lambda scan: scan.path))
    chosen = replace(listing, scans=scans).count("other versions of scans, left out", left_out)
    for key, counts in variants.items():
        chosen = chosen.count(_VARIANTS[key], counts)
    if num_without:
        wanted = ", ".join(f"{key}-{value}" for key, value in (("space", space), ("desc", desc)) if value is not None)
        chosen = chosen.say(f"{num_without} scans have no version with {wanted}")
    uniform = Counter(scan.suffix for scan in scans if scan.suffix == "UNIT1")
    return chosen.count("images taken as T1, whose background outside of the head is noise", uniform)


def add_masks(listing: BidsListing, *, root: Path) -> BidsListing:
    """Add the brain mask of each scan that has one, see `sibling_mask`, and a message with their number."""
    found = [(scan, sibling_mask(root / scan.path)) for scan in listing.scans]
    scans = [scan if mask is None else replace(scan, mask=mask.relative_to(root).as_posix()) for scan, mask in found]
    num_masked = sum(scan.mask is not None for scan in scans)
    message = f"{num_masked} of {len(scans)} scans have a brain mask: voxels outside of it are set to 0"
    return replace(listing, scans=tuple(scans)).say(*([message] if num_masked else []))


def _identity(scan: BidsScan) -> tuple[object, ...]:
    """What all images of one scan share: modality, suffix and entities; maps of one scan may have several suffixes."""
    entities = frozenset((key, label) for key, label in _entities(scan) if key not in _VARIANTS)
    return (scan.modality, "maps" if len(scan.paths) > 1 else scan.suffix, entities)


def _choose_label(key: str, labels: Collection[str | None]) -> str | None:
    """The label of the image to use: none if some image has none, otherwise the first one, and of echoes the middle."""
    if None in labels:
        return None
    known = sorted(filter(None, labels), key=lambda label: (int(label) if label.isdecimal() else 0, label))
    return known[(len(known) - 1) // 2 if key == "echo" else 0]


def _version(scan: BidsScan) -> str:
    entities = scan.entities
    pairs = [f"{key}-{entities[key]}" for key in _VERSION_ENTITIES if key in entities]
    return "_".join(pairs) or "without space and desc"


def _fits(scan: BidsScan, key: str, wanted: str | None) -> bool:
    return wanted is None or scan.entities.get(key) == wanted


def _rank(scan: BidsScan) -> tuple[object, ...]:
    """A sort key, best version first: tensor maps, preprocessed, then in a native space, then by path."""
    entities = scan.entities
    desc, space = entities.get("desc", ""), entities.get("space", "")
    by_space = _NATIVE_SPACES.index(space) if space in _NATIVE_SPACES else len(_NATIVE_SPACES)
    is_other_model = entities.get("model", "").lower() not in _TENSOR_MODELS
    return (is_other_model, desc != _PREPROCESSED, desc != "", by_space, scan.path)


def sibling_mask(scan: Path) -> Path | None:
    """The brain mask next to a derivative scan, by its BIDS name; None if there is none.

    `sub-01_space-T1w_desc-preproc_bold.nii.gz` -> `sub-01_space-T1w_desc-brain_mask.nii.gz`, as fMRIPrep and QSIPrep
    name them. A raw scan, without `space` and `desc`, has none.
    """
    *entities, _ = scan_stem(scan.name).split("_")
    if not any(entity.startswith(("space-", "desc-")) for entity in entities):
        return None
    # Ready maps share the mask of their series, whose name has no `model` and `param`, and echoes that of their run.
    shared = [entity for entity in entities if not entity.startswith(("desc-", "model-", "param-", "echo-"))]
    stem = "_".join([*shared, "desc-brain_mask"])
    candidates = (scan.with_name(stem + ending) for ending in (".nii.gz", ".nii", ".NII.GZ", ".NII"))
    return next((file for file in candidates if file.exists()), None)


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
        elif (same := groups[_map_identity(scan)].setdefault(found[1], scan)) is not scan:
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
            ready[scan.subject, scan.modality].append(_entities(scan))

    def reason(scan: BidsScan) -> tuple[str, str] | None:
        entities = _entities(scan)
        has_maps = len(scan.paths) == 1 and any(maps <= entities for maps in ready[scan.subject, scan.modality])
        return ("series with ready maps, left out", scan.suffix) if has_maps else None

    return listing.leave_out(reason)


def _entities(scan: BidsScan) -> frozenset[tuple[str, str]]:
    """The entities that all versions of one scan share; maps of one scan differ in `param`."""
    return frozenset((key, label) for key, label in scan.entities.items() if key not in (*_VERSION_ENTITIES, "param"))


def _map_identity(scan: BidsScan) -> tuple[str, ...]:
    """What all maps of one scan share; `FA` and `MD` are the suffix, or the label of `param`."""
    folder = scan.path.rpartition("/")[0]
    is_param = scan.suffix == f"{scan.datatype}map"
    entities = (f"{key}-{label}" for key, label in scan.entities.items() if key != "param")
    return (scan.modality, folder, str(is_param), *entities)
