"""From a BIDS tree to two manifests: rows of questions about every readable scan, split by subject."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from umbrella_data.bids import BidsScan, find_scans, read_facts
from umbrella_data.errors import ScanError
from umbrella_data.participants import read_participants
from umbrella_data.questions import METADATA_QUESTIONS, Question, ScanFacts

SPLITS = ("train", "test")
_HASH_BITS = 62

Row = dict[str, Any]
Progress = Callable[[Sequence[BidsScan]], Iterable[BidsScan]]


@dataclass
class BidsReport:
    """What became of a tree.

    Attributes:
        rows: The rows of each split.
        scans: The readable scans of each split.
        unreadable: Why each other scan cannot be used.
        notes: What else was left out, one sentence each.
        manifests: The files written, by split; a split without rows has none.
    """

    rows: dict[str, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    scans: dict[str, list[BidsScan]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    unreadable: list[ScanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifests: dict[str, Path] = field(default_factory=dict)


def write_manifests(
    root: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    test_fraction: float = 0.2,
    seed: int = 0,
    min_frames: int = 0,
    choices: Sequence[str] = (),
    numbers: Mapping[str, str | None] | None = None,
    progress: Progress = iter,
) -> BidsReport:
    """Read every scan of a tree once and write `train.jsonl` and `test.jsonl`, with paths relative to the tree.

    Args:
        root: The top folder of a BIDS tree.
        out: The folder for the manifests.
        test_fraction: Share of the subjects held out.
        seed: Seed of the split and of the questions' wording.
        min_frames: Leave out series with fewer frames.
        choices: Columns of `participants.tsv` that hold one of a few texts, to ask about.
        numbers: Columns that hold numbers, with their units.
        progress: Wraps the list of scans while they are read, as tqdm does.

    Raises:
        ManifestError: If there is no such tree, or `participants.tsv` is wrong.
    """
    tree = Path(root)
    listing = find_scans(tree)
    participants = read_participants(tree / "participants.tsv", choices=choices, numbers=numbers)
    report = BidsReport(notes=[*listing.notes, *participants.notes])
    for scan in progress(listing.scans):
        try:
            facts = read_facts(scan, root=tree, min_frames=min_frames)
        except ScanError as error:
            report.unreadable.append(error)
            continue
        split = "test" if is_test_subject(scan.subject, fraction=test_fraction, seed=seed) else "train"
        known = replace(facts, labels=participants.labels.get(scan.subject, {}))
        report.scans[split].append(scan)
        report.rows[split] += make_rows(scan, known, questions=participants.questions, seed=seed)
    report.notes += _missing_modalities(report, test_fraction=test_fraction)
    report.manifests = _write_splits(report.rows, folder=Path(out))
    return report


def make_rows(scan: BidsScan, facts: ScanFacts, *, questions: Sequence[Question], seed: int = 0) -> Iterator[Row]:
    """The manifest rows of one scan: one for each question that applies, those about its metadata first."""
    for question in (*METADATA_QUESTIONS, *questions):
        row_id = f"{scan.name}_{question.task}"
        asked = question.ask(facts, draw=_hash(f"{seed}:{row_id}"))
        if asked is None:
            continue
        text, words, answer = asked
        image = {"type": "image", "modality": scan.modality, "path": scan.path}
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


def _missing_modalities(report: BidsReport, *, test_fraction: float) -> Iterator[str]:
    modalities = {split: {scan.modality for scan in scans} for split, scans in report.scans.items()}
    for missing, other in (SPLITS, SPLITS[::-1]) if test_fraction > 0 else ():
        for modality in sorted(modalities[other] - modalities[missing]):
            num_subjects = len({scan.subject for scan in report.scans[other] if scan.modality == modality})
            yield (f"no {modality} scan in {missing}.jsonl: all {num_subjects} subjects who have one are in "
                   f"{other}.jsonl; another seed or test fraction may divide them")  # fmt: skip


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> (64 - _HASH_BITS)
