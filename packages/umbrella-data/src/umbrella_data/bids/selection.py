"""Selecting the scans of a BIDS tree: by options, a filter file, a list of excluded scans, and default rules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath

from umbrella_data.bids.derivatives import join_maps
from umbrella_data.bids.filter_file import (
    BidsFilter,
    Condition,
    is_accepted,
    read_excluded,
    read_filter,
    without_prefix,
)
from umbrella_data.bids.layout import BidsListing, BidsScan, MessageList, find_scans
from umbrella_data.errors import ManifestError
from umbrella_data.files.paths import scan_stem

OPTIONS = {
    "task": "task",
    "session": "ses",
    "run": "run",
    "acquisition": "acq",
    "echo": "echo",
    "reconstruction": "rec",
    "contrast": "ce",
}
"""The entity that each option selects by."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which scans of a BIDS tree are used.

    Attributes:
        labels: Accepted labels by option, a key of `OPTIONS`, with or without the entity (`rest` or `task-rest`). An
            option applies to the modalities of which some scan has its entity: `task` never to a T1w.
        filter_file: A BIDS filter file, see `umbrella_data.bids.filter_file`.
        exclude_file: A list of subjects (`sub-01`), sessions (`sub-01/ses-02`, `sub-01_ses-02`) and scans (a path or a
            file name), one a line.
    """

    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    filter_file: str | PathLike[str] | None = None
    exclude_file: str | PathLike[str] | None = None


@dataclass(frozen=True)
class _Rule:
    """A rule that applies unless an option or the filter file names its entity."""

    key: str
    reason: str
    accepts: Callable[[str | None], bool]
    modality: str | None = None


_RULES = (
    _Rule(
        "task",
        "series of other tasks than rest, left out (name them with --task)",
        lambda label: label is not None and label.lower().startswith("rest"),
        modality="rsfMRI",
    ),
    _Rule("ce", "images with contrast agent, left out (name them with --contrast)", lambda label: label is None),
    _Rule("inv", "images of one inversion time, left out", lambda label: label is None),
)


def select_scans(root: Path, selection: Selection, *, modalities: Collection[str] | None = None) -> BidsListing:
    """List the selected scans of a BIDS tree, with messages that count the others by reason; ready maps are joined.

    Args:
        root: Top folder of the tree.
        selection: Which scans to keep. What neither an option nor the filter file names is selected by rule: of
            rsfMRI, tasks that start with `rest`; no images with contrast agent (`ce`) or of one inversion time (`inv`).
        modalities: Only these, canonical names; None keeps all.

    Raises:
        ManifestError: If the tree or a file of the selection is missing; if that file is wrong; if no scan has a label
            of an option, with the labels that exist.
    """
    listing = find_scans(root)
    filters = BidsFilter({}) if selection.filter_file is None else read_filter(selection.filter_file)
    if selection.exclude_file is not None:
        listing = _exclude(listing, read_excluded(selection.exclude_file), file=selection.exclude_file)
    listing = join_maps(listing)
    options = {option: without_prefix(OPTIONS[option], labels) for option, labels in selection.labels.items() if labels}
    listing = _check_labels(listing, options, root=root)
    if modalities is not None:
        others = "scans of other modalities, left out"
        listing = listing.leave_out(lambda scan: None if scan.modality in modalities else (others, scan.modality))
    used: dict[str, set[str]] = defaultdict(set)
    for scan in listing.scans:
        used[scan.modality].update(scan.entities)

    def reason(scan: BidsScan) -> tuple[str, str] | None:
        chosen = {option: labels for option, labels in options.items() if OPTIONS[option] in used[scan.modality]}
        return _reason(scan, chosen, filters.conditions.get(scan.modality, {}))

    ignored = Counter(filters.ignored)
    return listing.leave_out(reason).count("queries of the filter file that name no modality, ignored", ignored)


def _reason(
    scan: BidsScan, options: Mapping[str, Condition], conditions: Mapping[str, Condition]
) -> tuple[str, str] | None:
    """Why a scan is left out, and its label of the entity that decides; None if it is kept."""
    for option, labels in options.items():
        if not is_accepted(OPTIONS[option], scan.entities.get(OPTIONS[option]), labels):
            return f"scans left out by --{option}", _labelled(scan, OPTIONS[option])
    for key, condition in conditions.items():
        if not is_accepted(key, _value(scan, key), condition):
            return "scans left out by --filter", _labelled(scan, key)
    named = {*conditions, *(OPTIONS[option] for option in options)}
    for rule in _RULES:
        applies = rule.key not in named and rule.modality in (None, scan.modality)
        if applies and not rule.accepts(scan.entities.get(rule.key)):
            return rule.reason, _labelled(scan, rule.key)
    return None


def _value(scan: BidsScan, key: str) -> str | None:
    """What a key of a filter file is compared with."""
    if key in ("suffix", "datatype"):
        return str(getattr(scan, key))
    if key == "extension":
        file = PurePosixPath(scan.path).name
        return file.removeprefix(scan_stem(file))
    return scan.entities.get(key)


def _labelled(scan: BidsScan, key: str) -> str:
    value = _value(scan, key)
    return f"without {key}" if value is None else f"{key}-{value}"


def _check_labels(listing: BidsListing, options: Mapping[str, Condition], *, root: Path) -> BidsListing:
    """Add a message about labels that no scan has; an error for the options without any other label."""
    problems: list[str] = []
    messages: list[str] = []
    for option, labels in options.items():
        key = OPTIONS[option]
        known = sorted({scan.entities[key] for scan in listing.scans if key in scan.entities})
        without = [label for label in labels if not any(is_accepted(key, each, (label,)) for each in known)]
        if without:
            wanted = ", ".join(f"{key}-{label}" for label in without)
            exist = ", ".join(f"{key}-{label}" for label in known) or f"no {key}-"
            text = f"--{option}: no scan has {wanted}; the scans of the tree have {exist}"
            (problems if len(without) == len(labels) else messages).append(text)
    if problems:
        raise ManifestError(problems, path=root)
    return listing.say(*messages)


def _exclude(listing: BidsListing, lines: Sequence[str], *, file: str | PathLike[str]) -> BidsListing:
    """Leave out the scans that a line names, and list the lines that name none."""
    names = {line: line.removeprefix("./").rstrip("/") for line in lines}
    matched: set[str] = set()

    def reason(scan: BidsScan) -> tuple[str, str] | None:
        found = _names(scan).intersection(names.values())
        matched.update(found)
        return ("scans left out by --exclude", scan.modality) if found else None

    listing = listing.leave_out(reason)
    messages = MessageList()
    for line, name in names.items():
        if name not in matched:
            messages.add(f"lines of {Path(file).name} that name no scan", line)
    return listing.say(*messages)


def _names(scan: BidsScan) -> set[str]:
    """What a line of a list of excluded scans may call a scan."""
    path = PurePosixPath(scan.path)
    names = {scan.name, scan.path, path.name, str(path.with_name(scan.name)), scan.subject}
    if session := scan.entities.get("ses"):
        names |= {f"{scan.subject}/ses-{session}", f"{scan.subject}_ses-{session}"}
    return names
