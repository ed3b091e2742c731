"""The table of modalities. To add one, add a row here; `tests/test_modality.py` holds every row to the contract."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class ModalitySpec:
    """One kind of scan.

    Attributes:
        name: The canonical name, as in manifests, batches and configs.
        aliases: Other names accepted at the door, compared without regard to case.
        is_series: Whether a scan is a series (C, X, Y, Z, T) and not a volume (C, X, Y, Z).
        channels: What the C channels hold, in order.
        is_masked: Whether the background is exactly 0, as in maps fitted inside of a brain mask.
        bids_suffixes: File name endings in a BIDS tree, as in `sub-01_T1w.nii.gz`.
        bids_datatype: The BIDS folder that holds such scans.
        description: The kind of scan in words, with its article, for questions and answers.
    """

    name: str
    aliases: tuple[str, ...]
    is_series: bool
    channels: tuple[str, ...]
    is_masked: bool
    bids_suffixes: tuple[str, ...]
    bids_datatype: str
    description: str

    @property
    def num_channels(self) -> int:
        """Number of channels C that the model sees."""
        return len(self.channels)

    @property
    def spatial_rank(self) -> int:
        """Length of an image size of this modality: 3, or 4 with time."""
        return 4 if self.is_series else 3


MODALITIES: Mapping[str, ModalitySpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ModalitySpec(
                name="T1",
                aliases=("T1w", "sMRI", "t1-weighted"),
                is_series=False,
                channels=("T1",),
                is_masked=False,
                bids_suffixes=("T1w",),
                bids_datatype="anat",
                description="a T1-weighted structural scan",
            ),
            ModalitySpec(
                name="rsfMRI",
                aliases=("bold", "fMRI", "rs-fMRI", "rest"),
                is_series=True,
                channels=("BOLD",),
                is_masked=False,
                bids_suffixes=("bold",),
                bids_datatype="func",
                description="a functional BOLD series",
            ),
            ModalitySpec(
                name="dMRI",
                aliases=("dwi", "DTI", "diffusion"),
                is_series=False,
                channels=("FA", "MD"),
                is_masked=True,
                bids_suffixes=("dwi",),
                bids_datatype="dwi",
                description="a diffusion-weighted scan",
            ),
        )
    }
)

_BY_ALIAS: Mapping[str, ModalitySpec] = MappingProxyType(
    {alias.lower(): spec for spec in MODALITIES.values() for alias in (spec.name, *spec.aliases)}
)


def find_modality(name: str) -> ModalitySpec:
    """Resolve a modality's name or alias.

    Args:
        name: For example `T1`, `T1w`, `bold` or `DWI`.

    Raises:
        ValueError: For an unknown name; the message lists the known ones and the nearest.
    """
    spec = _BY_ALIAS.get(name.strip().lower())
    if spec is not None:
        return spec
    near = difflib.get_close_matches(name.lower(), _BY_ALIAS, n=1)
    hint = f"; did you mean {_BY_ALIAS[near[0]].name!r}?" if near else ""
    raise ValueError(f"unknown modality {name!r}: known are {', '.join(MODALITIES)}{hint}")
