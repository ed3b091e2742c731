"""From a BIDS tree to two manifests: rows of questions about every readable scan, split by subject."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from umbrella_data.bids.derivatives import add_masks, choose_versions
from umbrella_data.bids.layout import BidsListing, BidsScan, find_scans, keep_modalities, read_facts
from umbrella_data.bids.participants import read_participants
from umbrella_data.bids.questions import METADATA_QUESTIONS, Question, ScanFacts
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.parallel import map_unordered
from umbrella_data.manifest.sample import resolve_inside
from umbrella_data.modality import find_modality
from umbrella_data.scan.diffusion import check_dipy
from umbrella_data.scan.warnings import WarningList

SPLITS = ("train", "test")
_HASH_BITS = 62

Row = dict[str, Any]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class BidsReport:
    """What became of a tree.

    Attributes:
        rows: The rows of each split.
        scans: The readable scans of each split.
        unreadable: Why each other scan cannot be used.
        notes: What else was left out, one sentence each.
        warnings: Readable scans with something odd in their headers or sidecars.
        manifests: The files written, by split; a split without rows has none.
    """

    rows: dict[str, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    scans: dict[str, list[BidsScan]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    unreadable: list[ScanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: WarningList = field(default_factory=WarningList)
    manifests: dict[str, Path] = field(default_factory=dict)


def write_manifests(
    root: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    data_root: str | os.PathLike[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    min_frames: int = 0,
    choices: Sequence[str] = (),
    numbers: Mapping[str, str | None] | None = None,
    modalities: Collection[str] | None = None,
    space: str | None = None,
    desc: str | None = None,
    with_masks: bool = True,
    participants: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    num_workers: int | None = 1,
    progress: Progress = lambda results, total: results,  # noqa: ARG005
) -> BidsReport:
    """Read every scan of a tree once and write `train.jsonl` and `test.jsonl`.

    Args:
        root: The top folder of a BIDS tree, raw or of derivatives (fMRIPrep, QSIPrep).
        out: The folder for the manifests.
        data_root: Folder that paths in the manifests are relative to, and that no file may leave, links followed; the
            tree must lie in it. By default the tree itself. Tables that are named may lie anywhere.
        test_fraction: Share of the subjects held out.
        seed: Seed of the split and of the questions' wording.
        min_frames: Leave out series with fewer frames.
        choices: Columns of `participants.tsv` that hold one of a few texts, to ask about.
        numbers: Columns that hold numbers, with their units.
        modalities: Take scans of these modalities alone, names or aliases; None takes all.
        space: Take scans in this space alone, such as `MNI152NLin2009cAsym`; see `umbrella_data.bids.derivatives`.
        desc: Take scans of this description alone, such as `preproc`.
        with_masks: Whether scans are read inside of the brain masks that are next to them in a tree of derivatives.
        participants: The file with the labels, or several, joined by subject; by default the tree's own.
        num_workers: Processes that read scans; None for as many as there are cores.
        progress: Wraps the results while scans are read, as tqdm does; called with their number.

    Raises:
        ManifestError: If there is no such tree, or it is outside of `data_root`, or a table of participants is
            missing or wrong, or the tree's own is a link that leads out of `data_root`.
        ValueError: For an unknown modality.
        ImportError: If a DWI must be fitted and dipy is missing, before a scan is read.
    """
    tree = Path(root)
    wanted = None if modalities is None else {find_modality(name).name for name in modalities}
    listing = find_scans(tree)
    if wanted is not None:
        listing = keep_modalities(listing, wanted)
    listing = choose_versions(listing, space=space, desc=desc)
    if with_masks:
        listing = add_masks(listing, root=tree)
    base = tree if data_root is None else Path(data_root)
    listing = _relative_to(base, listing, tree=tree)
    asked = [*choices, *(numbers or {})]
    tables = _tables(participants, tree=tree, base=base, are_needed=bool(asked))
    known_labels = read_participants(tables, choices=choices, numbers=numbers)
    notes = [*known_labels.compare({scan.subject for scan in listing.scans}), *known_labels.notes]
    report = BidsReport(notes=[*listing.notes, *notes])
    check_dipy(base / scan.path for scan in listing.scans if find_modality(scan.modality).num_channels > 1)
    # A folder that cannot be made ends the work here, and not when everything was read.
    Path(out).mkdir(parents=True, exist_ok=True)
    read = partial(_read, root=base, min_frames=min_frames)
    results = progress(map_unordered(read, listing.scans, num_workers=num_workers), len(listing.scans))
    for scan, facts in sorted(results, key=lambda result: result[0].path):
        if isinstance(facts, ScanError):
            report.unreadable.append(facts)
            continue
        report.warnings.add(facts.warnings, subject=scan.subject, modality=scan.modality)
        split = "test" if is_test_subject(scan.subject, fraction=test_fraction, seed=seed) else "train"
        known = replace(facts, labels=known_labels.labels.get(scan.subject, {}))
        report.scans[split].append(scan)
        report.rows[split] += make_rows(scan, known, questions=known_labels.questions, seed=seed)
    report.notes += _unasked(report, asked, questions=known_labels.questions)
    report.notes += _missing_modalities(report, test_fraction=test_fraction)
    report.manifests = _write_splits(report.rows, folder=Path(out))
    return report


def _relative_to(base: Path, listing: BidsListing, *, tree: Path) -> BidsListing:
    """The listing of a tree with the paths of its scans relative to a folder that has the tree."""
    if not tree.resolve().is_relative_to(base.resolve()):
        raise ManifestError(f"does not lie in data_root {base}; name a folder that has it", path=tree)
    prefix = tree.resolve().relative_to(base.resolve())
    scans = [
        replace(
            scan,
            path=(prefix / scan.path).as_posix(),
            mask=None if scan.mask is None else (prefix / scan.mask).as_posix(),
        )
        for scan in listing.scans
    ]
    return BidsListing(tuple(scans), listing.notes)


def _tables(
    named: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, tree: Path, base: Path, are_needed: bool
) -> list[Path]:
    """The tables that were named; without any the tree's own, which may be missing where nothing needs it."""
    if named:
        return [Path(named)] if isinstance(named, (str, os.PathLike)) else [Path(path) for path in named]
    own = tree / "participants.tsv"
    if not (are_needed or own.is_file()):
        return []
    # Notes and errors quote a table: nobody chose this one, so that it is held to the folder as a scan is.
    folder = base.resolve()
    try:
        resolve_inside((tree.resolve().relative_to(folder) / own.name).as_posix(), root=folder)
    except ValueError as error:
        raise ManifestError(f"{error}, or name the table (--participants)", path=own) from error
    return [own]


def _read(scan: BidsScan, *, root: Path, min_frames: int) -> tuple[BidsScan, ScanFacts | ScanError]:
    try:
        return scan, read_facts(scan, root=root, min_frames=min_frames)
    except ScanError as error:
        return scan, error.bare()


def make_rows(scan: BidsScan, facts: ScanFacts, *, questions: Sequence[Question], seed: int = 0) -> Iterator[Row]:
    """The manifest rows of one scan: one for each question that applies, those about its metadata first."""
    for question in (*METADATA_QUESTIONS, *questions):
        row_id = f"{scan.name}_{question.task}"
        asked = question.ask(facts, draw=_hash(f"{seed}:{row_id}"))
        if asked is None:
            continue
        text, words, answer = asked
        image = {"type": "image", "modality": scan.modality, "path": scan.path}
        image |= {"mask": scan.mask} if scan.mask is not None else {}
        yield {
            "id": row_id,
            "subject": scan.subject,
            "task": question.task,
            "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": text}]},
                {"role": "assistant", "content": [{"type": "text", "text": words}]},
            ],
            "answer": answer,
        }


def is_test_subject(subject: str, *, fraction: float, seed: int = 0) -> bool:
    """Whether a subject is held out: a hash decides, so that subjects who join later move no other one."""
    return _hash(f"{seed}:{subject}") < fraction * (1 << _HASH_BITS)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a manifest whole or not at all. Without rows, an old file of that name goes: its split would be another."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _write_splits(rows: Mapping[str, Sequence[Row]], *, folder: Path) -> dict[str, Path]:
    paths = {split: folder / f"{split}.jsonl" for split in rows}
    for split, path in paths.items():
        write_rows(path, rows[split])
    return {split: path for split, path in paths.items() if rows[split]}


def _unasked(report: BidsReport, asked: Sequence[str], *, questions: Sequence[Question]) -> Iterator[str]:
    """Columns that were asked for, and that no row came of."""
    tasks = {row["task"] for rows in report.rows.values() for row in rows}
    known = {question.task for question in questions}
    for column in asked:
        if column in tasks:
            continue
        if column in known:
            yield f"no question about {column}: no subject with a readable scan has a value"
        else:
            yield f"no question about {column}: a choice needs two different values, a number one that can be read"


def _missing_modalities(report: BidsReport, *, test_fraction: float) -> Iterator[str]:
    modalities = {split: {scan.modality for scan in scans} for split, scans in report.scans.items()}
    for missing, other in (SPLITS, SPLITS[::-1]) if test_fraction > 0 else ():
        for modality in sorted(modalities[other] - modalities[missing]):
            num_subjects = len({scan.subject for scan in report.scans[other] if scan.modality == modality})
            yield (f"no {modality} scan in {missing}.jsonl: all {num_subjects} subjects who have one are in "
                   f"{other}.jsonl; another seed or test fraction may divide them")  # fmt: skip


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> (64 - _HASH_BITS)
