"""Volumes of brain regions, from segmentations in a folder of BIDS derivatives."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from umbrella_data.bids.derivatives import choose_versions
from umbrella_data.bids.layout import BidsListing, BidsScan, parse_entities
from umbrella_data.files.paths import scan_stem
from umbrella_data.manifest.sample import Scan, subject_key
from umbrella_data.scan.voxels import read_voxels
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

# Entities of a segmentation that its scan does not share.
_OWN_ENTITIES = {"space", "res", "den", "cohort", "desc", "seg", "atlas", "label"}


class Segmentations:
    """The files `*_dseg.nii.gz` of a folder, by subject and session.

    Of several versions of a segmentation one is used, chosen as `umbrella_data.bids.derivatives.choose_versions` does.

    Args:
        root: The folder, as in `derivatives/dlmuse`.

    Raises:
        RunError: The folder does not exist or has no segmentation, or the chosen ones are of several kinds (`desc`,
            `space`, ...), whose labels and sizes cannot be compared.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise RunError(f"{root}: there is no such folder; give --segmentations a folder of BIDS derivatives")
        self.root = root
        paths = sorted(path for path in root.rglob("sub-*_dseg.nii*") if path.is_file())
        if not paths:
            raise RunError(f"{root}: has no file sub-*_dseg.nii.gz, as in sub-01/anat/sub-01_desc-x_dseg.nii.gz")
        found = [(scan_stem(path.name), path.relative_to(root).as_posix()) for path in paths]
        listing = choose_versions(
            BidsListing(tuple(BidsScan(stem, stem.split("_")[0], "T1", (path,)) for stem, path in found), ())
        )
        for message in listing.messages:
            logger.info("%s: %s", root, message)
        kinds = {_kind(scan.entities) for scan in listing.scans}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind or "without entities" for kind in kinds))
            raise RunError(
                f"{root}: has segmentations of several kinds ({names}); give a folder with those of one kind"
            )
        self._paths: dict[tuple[str, str | None], list[tuple[Path, dict[str, str]]]] = defaultdict(list)
        for scan in listing.scans:
            entities = scan.entities
            self._paths[entities["sub"], entities.get("ses")].append((root / scan.path, entities))

    def find(self, scan: Scan, *, subject: str) -> Path | None:
        """The segmentation of a scan's subject and session; None without one, or if several fit.

        Of several in one session, as of two runs, the one whose entities are those of the scan is taken.

        Args:
            scan: The scan, of any modality; its file name has the session.
            subject: Its subject in the manifest.
        """
        entities = parse_entities(scan_stem(scan.paths[0].name))
        candidates = self._paths.get((subject_key(subject), entities.get("ses")), [])
        if len(candidates) > 1:
            shared = set(entities.items())
            candidates = [
                (path, own)
                for path, own in candidates
                if {(key, label) for key, label in own.items() if key not in _OWN_ENTITIES} <= shared
            ]
        return candidates[0][0] if len(candidates) == 1 else None


def region_volumes(path: Path) -> dict[int, float]:
    """Volume in mm3 of each label of a segmentation but 0.

    Raises:
        ScanError: The file is damaged.
        RunError: A value is not a whole number.
    """
    voxels = read_voxels(path, rank=3)
    labels, counts = np.unique(voxels.frames, return_counts=True)
    wrong = labels[labels != np.rint(labels)]
    if wrong.size:
        raise RunError(
            f"{path}: has the value {wrong[0]:g}; the values of a segmentation are whole numbers, its labels"
        )
    voxel_mm3 = abs(float(np.linalg.det(voxels.affine[:3, :3])))
    return {int(label): int(count) * voxel_mm3 for label, count in zip(labels, counts, strict=True) if label != 0}


def _kind(entities: dict[str, str]) -> str:
    return "_".join(f"{key}-{label}" for key, label in sorted(entities.items()) if key in _OWN_ENTITIES)
