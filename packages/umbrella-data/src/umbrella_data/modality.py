"""The table of modalities: its rows, and `ModalitySpec` objects of installed packages.

To add a modality, add a row to `_ROWS` (`tests/test_modality.py` checks every row), or define an entry point in the
group `umbrella_data.modalities` of another package, which refers to a `ModalitySpec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from umbrella_data.errors import did_you_mean

ENTRY_POINTS = "umbrella_data.modalities"


@dataclass(frozen=True, kw_only=True)
class ModalitySpec:
    """One kind of scan.

    Attributes:
        name: The canonical name, as in manifests, batches and configs.
        aliases: Other accepted names, compared without regard to case.
        is_series: Whether a scan is a series (C, X, Y, Z, T) and not a volume (C, X, Y, Z).
        channels: Names of the C channels, in order.
        is_masked: Whether the background is exactly 0, as in maps fitted inside of a brain mask.
        bids_suffixes: File name endings in a BIDS tree, as in `sub-01_T1w.nii.gz`.
        bids_datatype: The BIDS folder of such scans.
        description: The kind of scan in words, with its article, for questions and answers.

    Raises:
        ValueError: If the name is not an identifier, or a string is given where a tuple of strings is needed.
    """

    name: str
    aliases: tuple[str, ...]
    is_series: bool
    channels: tuple[str, ...]
    is_masked: bool
    bids_suffixes: tuple[str, ...]
    bids_datatype: str
    description: str

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"the name {self.name!r} of a modality must consist of letters, digits and underscores: "
                             "a module of the model has this name")  # fmt: skip
        for key in ("aliases", "channels", "bids_suffixes"):
            if isinstance(value := getattr(self, key), str):
                raise ValueError(f"{key} of modality {self.name} must be a tuple: ({value!r},)")

    @property
    def labels(self) -> tuple[str, ...]:
        """What no other modality may have: its name and aliases in lower case, its places in a BIDS tree."""
        places = (f"{self.bids_datatype}/*_{suffix}" for suffix in self.bids_suffixes)
        return (*dict.fromkeys(name.lower() for name in (self.name, *self.aliases)), *places)

    @property
    def num_channels(self) -> int:
        """Number of channels C that the model sees."""
        return len(self.channels)

    @property
    def spatial_rank(self) -> int:
        """Length of an image size of this modality: 3, or 4 with time."""
        return 4 if self.is_series else 3


_ROWS = (
    ModalitySpec(
        name="T1",
        aliases=("T1w", "sMRI", "t1-weighted"),
        is_series=False,
        channels=("T1",),
        is_masked=False,
        bids_suffixes=("T1w", "UNIT1"),  # UNIT1: the uniform T1-weighted image of an MP2RAGE
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


class _Table(Mapping[str, ModalitySpec]):
    """The specs by their names. Entry points are loaded on the first lookup, not when this module is imported."""

    @cached_property
    def _by_name(self) -> dict[str, ModalitySpec]:
        specs = {spec.name: spec for spec in _ROWS}
        owner = {label: spec.name for spec in _ROWS for label in spec.labels}
        # The same order in every process: sets of modalities are numbered by it.
        for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
            spec = _load(entry)
            if taken := [label for label in spec.labels if label in owner]:
                raise ValueError(f"{_origin(entry)}: {taken[0]!r} of modality {spec.name} belongs to {owner[taken[0]]} "
                                 "already; choose another, or remove the package")  # fmt: skip
            owner |= dict.fromkeys(spec.labels, spec.name)
            specs[spec.name] = spec
        return specs

    @cached_property
    def by_alias(self) -> dict[str, ModalitySpec]:
        """The specs by their names and aliases in lower case."""
        return {alias.lower(): spec for spec in self.values() for alias in (spec.name, *spec.aliases)}

    def __getitem__(self, name: str) -> ModalitySpec:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


def _load(entry: EntryPoint) -> ModalitySpec:
    try:
        spec = entry.load()
    except Exception as error:  # code of another package
        raise ValueError(f"{_origin(entry)}: cannot be loaded: {error!r}") from error
    if not isinstance(spec, ModalitySpec):
        raise ValueError(f"{_origin(entry)}: {entry.value} is a {type(spec).__name__}; it must be a ModalitySpec")
    return spec


def _origin(entry: EntryPoint) -> str:
    dist = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"{dist}, entry point {entry.name!r} of {ENTRY_POINTS}"


MODALITIES = _Table()


def find_modality(name: str) -> ModalitySpec:
    """Resolve a modality's name or alias.

    Args:
        name: For example `T1`, `T1w`, `bold` or `DWI`.

    Raises:
        ValueError: For an unknown name, with the known ones and the most similar; for an invalid modality of an
            installed package.
    """
    spec = MODALITIES.by_alias.get(name.strip().lower())
    if spec is not None:
        return spec
    meant = did_you_mean(name, [*MODALITIES.by_alias, *MODALITIES])
    raise ValueError(f"unknown modality {name!r}: known are {', '.join(MODALITIES)}{meant}")
