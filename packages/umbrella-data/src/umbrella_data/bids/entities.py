"""Entities of BIDS file names, and conditions on their labels."""

from __future__ import annotations

from collections.abc import Iterable

Condition = tuple[str | None, ...]
"""Accepted labels of an entity; None accepts its absence, `ANY` any label."""

ANY = "*"

# By the long names of the BIDS schema and of pybids.
ENTITIES = {
    **{"subject": "sub", "session": "ses", "acquisition": "acq", "ceagent": "ce", "tracer": "trc", "direction": "dir"},
    **{"reconstruction": "rec", "modality": "mod", "inversion": "inv", "mtransfer": "mt", "processing": "proc"},
    **{"hemisphere": "hemi", "resolution": "res", "density": "den", "description": "desc"},
}
"""Entities by their long names, where these differ."""

OTHER_ENTITIES = (
    "sample", "task", "tracksys", "stain", "run", "echo", "flip", "part", "space", "split", "recording", "chunk",
    "atlas", "cohort", "label", "model", "param",
)  # fmt: skip
"""Entities whose long names are their names."""

# BIDS compares these as numbers: run-1 is run-01.
_INDEXES = ("run", "echo", "flip", "inv", "split", "chunk")


def is_accepted(key: str, label: str | None, condition: Condition) -> bool:
    """Whether a label meets a condition.

    Args:
        key: The entity, such as `run`.
        label: Its label; None without the entity.
        condition: The accepted labels.
    """
    if label is None:
        return None in condition
    return any(wanted == ANY or _is_same(key, label, wanted) for wanted in condition if wanted is not None)


def without_prefix(key: str, labels: Iterable[str]) -> Condition:
    """The labels without the entity: `rest` for `task-rest`."""
    return tuple(label.removeprefix(f"{key}-") for label in labels)


def _is_same(key: str, label: str, wanted: str) -> bool:
    if key in _INDEXES and label.isdecimal() and wanted.isdecimal():
        return int(label) == int(wanted)
    return label == wanted
