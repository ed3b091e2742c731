"""Conditions on the entities of BIDS file names, and files that select scans.

These are BIDS filter files, as fMRIPrep and QSIPrep read them, and lists of excluded scans.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from umbrella_data.errors import ManifestError, did_you_mean
from umbrella_data.manifest.row_json import to_object
from umbrella_data.modality import MODALITIES

Condition = tuple[str | None, ...]
"""Accepted labels of an entity; None accepts its absence, `*` any label."""

_ANY = "*"

# By the long names of the BIDS schema and of pybids, where these differ.
_ENTITIES = {
    **{"subject": "sub", "session": "ses", "acquisition": "acq", "ceagent": "ce", "tracer": "trc", "direction": "dir"},
    **{"reconstruction": "rec", "modality": "mod", "inversion": "inv", "mtransfer": "mt", "processing": "proc"},
    **{"hemisphere": "hemi", "resolution": "res", "density": "den", "description": "desc"},
}

# Entities whose long names are their names.
_OTHER_ENTITIES = (
    "sample", "task", "tracksys", "stain", "run", "echo", "flip", "part", "space", "split", "recording", "chunk",
    "atlas", "cohort", "label", "model", "param",
)  # fmt: skip

# BIDS compares these as numbers: run-1 is run-01.
_INDEXES = ("run", "echo", "flip", "inv", "split", "chunk")
# A query may also name what is no entity.
_KEYS = _ENTITIES | {key: key for key in (*_ENTITIES.values(), *_OTHER_ENTITIES, "datatype", "suffix", "extension")}
_QUERIES: dict[str | None, Condition] = {
    None: (None,),
    "Query.NONE": (None,),
    "Query.ANY": (_ANY,),
    "Query.REQUIRED": (_ANY,),
    "Query.OPTIONAL": (_ANY, None),
}


@dataclass(frozen=True)
class BidsFilter:
    """The queries of a filter file.

    Attributes:
        conditions: Conditions by modality and entity (`task`, `acq`), `datatype`, `suffix` or `extension`.
        ignored: Queries that name no modality, such as `fmap`.
    """

    conditions: Mapping[str, Mapping[str, Condition]]
    ignored: tuple[str, ...] = ()


def read_filter(file: str | PathLike[str]) -> BidsFilter:
    """Read a BIDS filter file: `{"t1w": {"session": "01", "acquisition": null}, "bold": {"task": ["rest"]}}`.

    A query is named as a modality (`t1w`, `bold`, `dwi`). A value is a label, a number, null for no such entity,
    `Query.NONE`, `Query.ANY` (also `*`), `Query.OPTIONAL`, or a list of these.

    Raises:
        ManifestError: If the file is missing, or with all its problems: no JSON, unknown entities, wrong values.
    """
    try:
        content = json.loads(_read_text(file), object_pairs_hook=to_object)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not JSON: {error}", path=file) from error
    if not isinstance(content, dict):
        raise ManifestError('must be a JSON object of queries, such as {"bold": {"task": "rest"}}', path=file)
    problems: list[str] = []
    conditions: dict[str, dict[str, Condition]] = {}
    ignored: list[str] = []
    for name, query in content.items():
        spec = MODALITIES.by_alias.get(name.strip().lower())
        if spec is None:
            ignored.append(name)
        elif not isinstance(query, dict):
            problems.append(f'{name}: must be an object of entities, such as {{"session": "01"}}')
        else:
            conditions.setdefault(spec.name, {}).update(_read_query(name, query, problems))
    if problems:
        raise ManifestError(problems, path=file)
    return BidsFilter(conditions, tuple(ignored))


def read_excluded(file: str | PathLike[str]) -> list[str]:
    """The lines of a list of excluded subjects, sessions and scans, without comments (`#`) and blank lines.

    Raises:
        ManifestError: If the file is missing or not UTF-8.
    """
    lines = (line.partition("#")[0].strip() for line in _read_text(file).splitlines())
    return [line for line in lines if line]


def _read_text(file: str | PathLike[str]) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror or error}", path=file) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 text: {error}", path=file) from error


def _read_query(name: str, query: Mapping[str, object], problems: list[str]) -> Iterator[tuple[str, Condition]]:
    """The conditions of one query by key; its problems are added to the list."""
    for entity, value in query.items():
        key = _KEYS.get(entity)
        if key is None:
            problems.append(f"{name}.{entity}: unknown entity{did_you_mean(entity, _KEYS)}")
            continue
        values = value if isinstance(value, list) else [value]
        accepted = [_read_value(key, each) for each in values]
        if not accepted or None in accepted:
            shown = f"{json.dumps(value):.60}"
            problems.append(f"{name}.{entity}: {shown} must be a label, a number, null or a list of these")
            continue
        yield key, tuple(label for labels in accepted if labels is not None for label in labels)


def _read_value(key: str, value: object) -> Condition | None:
    """The accepted labels; None for a value of another type."""
    if value is None or (isinstance(value, str) and value in _QUERIES):
        return _QUERIES[value]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return without_prefix(key, [str(value)])


def is_accepted(key: str, label: str | None, condition: Condition) -> bool:
    """Whether a label meets a condition.

    Args:
        key: The entity, such as `run`.
        label: Its label; None without the entity.
        condition: The accepted labels.
    """
    if label is None:
        return None in condition
    return any(wanted == _ANY or _is_same(key, label, wanted) for wanted in condition if wanted is not None)


def without_prefix(key: str, labels: Iterable[str]) -> Condition:
    """The labels without the entity: `rest` for `task-rest`."""
    return tuple(label.removeprefix(f"{key}-") for label in labels)


def _is_same(key: str, label: str, wanted: str) -> bool:
    if key in _INDEXES and label.isdecimal() and wanted.isdecimal():
        return int(label) == int(wanted)
    return label == wanted
