"""Writes the manifests of a BIDS tree: questions about every readable scan, split by subject into train and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from umbrella_data.bids.derivatives import add_masks, choose_versions, prefer_maps
from umbrella_data.bids.label_files import find_label_files
from umbrella_data.bids.layout import BidsListing, BidsScan, read_metadata
from umbrella_data.bids.participants import Participants, read_participants
from umbrella_data.bids.questions import METADATA_QUESTIONS, Question, ScanMetadata
from umbrella_data.bids.selection import Selection, select_scans
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.modality import find_modality
from umbrella_data.scan.diffusion import check_dipy, needs_fit
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_B, NonFinite, check_b_limits
from umbrella_data.scan.shard import ScanParts, read_scans
from umbrella_data.scan.verify import VerifiedScan
from umbrella_data.scan.warnings import WarningList

SPLITS = ("train", "test")
_HASH_BITS = 62

Row = dict[str, Any]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class BidsReport:
    """The manifests of a BIDS tree, and everything that was left out.

    Attributes:
        rows: The rows of each split.
        scans: The readable scans of each split.
        unreadable: The errors of scans that cannot be used.
        messages: Other things that were left out or are missing.
        warnings: Readable scans with suspicious headers or sidecars.
        manifests: The written files by split; a split without rows has none.
    """

    rows: dict[str, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    scans: dict[str, list[BidsScan]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    unreadable: list[ScanError] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    warnings: WarningList = field(default_factory=WarningList)
    manifests: dict[str, Path] = field(default_factory=dict)


def write_manifests(
    root: str | PathLike[str],
    *,
    out: str | PathLike[str],
    data_root: str | PathLike[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    min_frames: int = 0,
    choices: Sequence[str] = (),
    numbers: Mapping[str, str | None] | None = None,
    questions: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
    selection: Selection | None = None,
    space: str | None = None,
    desc: str | None = None,
    with_masks: bool = True,
    missing: Sequence[str] = (),
    participants: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
    non_finite: NonFinite = "outside_mask",
    num_workers: int | None = 1,
    parts: ScanParts | None = None,
    progress: Progress = lambda results, total: results,  # noqa: ARG005
) -> BidsReport:
    """Read every scan of a BIDS tree once, and write `train.jsonl` and `test.jsonl`.

    Args:
        root: Top folder of a raw or a derivative tree (fMRIPrep, QSIPrep).
        out: Folder for the manifests.
        data_root: Folder that paths in the manifests are relative to; it must contain the tree, and no scan may be
            outside of it, symbolic links resolved. The tree itself by default.
        test_fraction: Fraction of the subjects in the test split, 0 to 1; a split without subjects has no file.
        seed: Seed of the split and of the questions' wording.
        min_frames: Leave out series with fewer frames.
        choices: Categorical columns of `participants.tsv` to ask about.
        numbers: Numeric columns to ask about, with their units; None takes that of `participants.json`.
        questions: Only questions of these tasks, such as `age`; None asks all that apply.
        modalities: Only these modalities, names or aliases; None keeps all.
        selection: Which scans to use; None is `Selection()`, whose defaults leave out tasks other than rest, images
            with contrast agent, and all but one echo of a run.
        space: Only this space, such as `MNI152NLin2009cAsym`; see `umbrella_data.bids.derivatives`.
        desc: Only this description, such as `preproc`.
        with_masks: Whether rows name the brain masks of derivatives, so that voxels outside of them are set to 0.
        missing: Codes for missing values in the tables: `-9`, or `age=-9` in one column.
        participants: Tables with labels, joined by subject and session; they may be anywhere. `participants.tsv` of the
            tree by default. `sub-*_sessions.tsv` and JSON files next to them are read with them.
        max_b: Largest b-value that the tensor of a DWI is fitted on, in s/mm2.
        b0_threshold: Largest b-value of a b0 volume of a DWI, in s/mm2.
        non_finite: What to do with voxels that are not finite, see `umbrella_data.scan.voxels`.
        num_workers: Processes that read scans; None for one per core.
        parts: If given, only the scans of its shard are read, and no manifest is written; or if it merges, no scan is
            read, and its folder is removed.
        progress: Wraps the results while scans are read, as tqdm does; called with the results and their number.

    Raises:
        ManifestError: If there is no such question; if the tree does not exist or is outside of `data_root`, or if a
            table of labels or its JSON file is missing or invalid, or is the tree's own and a link out of `data_root`;
            or for a wrong `selection`; or with everything that is wrong with the shards to merge.
        ValueError: For an unknown modality, or a `b0_threshold` that is not below `max_b`.
        ImportError: If a DWI must be fitted and dipy is missing, before a scan is read.
    """
    check_b_limits(max_b=max_b, b0_threshold=b0_threshold)
    tree = Path(root)
    wanted = None if modalities is None else {find_modality(name).name for name in modalities}
    listing = select_scans(tree, selection or Selection(), modalities=wanted)
    listing = prefer_maps(choose_versions(listing, space=space, desc=desc))
    if with_masks:
        listing = add_masks(listing, root=tree)
    base = tree if data_root is None else Path(data_root)
    listing = _relative_to(base, listing, tree=tree)
    columns = [*choices, *(numbers or {})]
    given = [participants] if isinstance(participants, (str, PathLike)) else participants
    files = find_label_files(
        [Path(path) for path in given],
        tree=tree,
        base=base,
        subjects={scan.subject for scan in listing.scans},
        are_needed=bool(columns or missing),
    )
    known = read_participants(files, choices=choices, numbers=numbers, missing=missing)
    asked = _choose_questions([*METADATA_QUESTIONS, *known.questions], questions, tree=tree)
    compared = known.compare([(scan.subject, scan.session) for scan in listing.scans])
    report = BidsReport(messages=[*listing.messages, *compared, *known.messages])
    check_dipy(base / scan.path for scan in listing.scans if needs_fit(scan.paths, scan.modality))
    # An output folder that cannot be created is reported before the scans are read.
    Path(out).mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "min_frames": min_frames,
        "max_b": max_b,
        "b0_threshold": b0_threshold,
        "non_finite": non_finite,
    }
    results = read_scans(
        partial(read_metadata, root=base, **options),
        {scan: scan.subject for scan in listing.scans},
        parts=parts,
        files=lambda scan: [base / path for path in scan.files],
        settings=options,
        num_workers=num_workers,
        progress=progress,
    )
    _add_results(report, results, known=known, questions=asked, test_fraction=test_fraction, seed=seed)
    if parts is not None and parts.shard is not None:
        return report
    report.messages += _columns_without_rows(report, columns, known.questions)
    report.messages += _missing_modalities(report, test_fraction=test_fraction)
    report.manifests = _write_splits(report.rows, folder=Path(out))
    if parts is not None:
        parts.remove()
    return report


def _add_results(
    report: BidsReport,
    results: Iterable[tuple[BidsScan, VerifiedScan | ScanError]],
    *,
    known: Participants,
    questions: Sequence[Question],
    test_fraction: float,
    seed: int,
) -> None:
    for scan, found in sorted(results, key=lambda result: result[0].path):
        if isinstance(found, ScanError):
            report.unreadable.append(found)
            continue
        report.warnings.add(found.warnings, subject=scan.subject, modality=scan.modality)
        split = "test" if is_test_subject(scan.subject, fraction=test_fraction, seed=seed) else "train"
        labels = known.labels_of(scan.subject, scan.session)
        metadata = ScanMetadata(scan.modality, num_frames=found.num_frames, num_b0=found.num_b0, labels=labels)
        report.scans[split].append(scan)
        report.rows[split] += make_rows(scan, metadata, questions=questions, seed=seed)


def _choose_questions(known: Sequence[Question], tasks: Collection[str] | None, *, tree: Path) -> list[Question]:
    names = [question.task for question in known]
    if unknown := sorted(set(tasks or ()) - set(names)):
        raise ManifestError(
            f"no question {', '.join(unknown)}; there are questions about {', '.join(names)}, and about columns that "
            "--choice and --number name",
            path=tree,
        )
    return [question for question in known if tasks is None or question.task in tasks]


def _relative_to(base: Path, listing: BidsListing, *, tree: Path) -> BidsListing:
    """The listing with paths relative to `base`, a folder that contains the tree."""
    if not tree.resolve().is_relative_to(base.resolve()):
        raise ManifestError(f"not in data_root {base}; give a data_root that contains it", path=tree)
    prefix = tree.resolve().relative_to(base.resolve())
    scans = []
    for scan in listing.scans:
        mask = None if scan.mask is None else (prefix / scan.mask).as_posix()
        scans.append(replace(scan, paths=tuple((prefix / path).as_posix() for path in scan.paths), mask=mask))
    return replace(listing, scans=tuple(scans))


def make_rows(scan: BidsScan, metadata: ScanMetadata, *, questions: Sequence[Question], seed: int = 0) -> Iterator[Row]:
    """The manifest rows of one scan: one for each question that applies."""
    for question in questions:
        row_id = f"{scan.name}_{question.task}"
        exchange = question.ask(metadata, draw=_hash(f"{seed}:{row_id}"))
        if exchange is None:
            continue
        text, answer_text, answer = exchange
        path = scan.path if len(scan.paths) == 1 else list(scan.paths)
        image: Row = {"type": "image", "modality": scan.modality, "path": path}
        image |= {"mask": scan.mask} if scan.mask is not None else {}
        yield {
            "id": row_id,
            "subject": scan.subject,
            "task": question.task,
            "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": text}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer_text}]},
            ],
            "answer": answer,
        }


def is_test_subject(subject: str, *, fraction: float, seed: int = 0) -> bool:
    """Whether a subject is in the test split, by a hash: subjects added later do not move others."""
    return _hash(f"{seed}:{subject}") < fraction * (1 << _HASH_BITS)


def _write_splits(rows: Mapping[str, Sequence[Row]], *, folder: Path) -> dict[str, Path]:
    """Write a manifest for each split; without rows, remove an old one, which belongs to another split."""
    paths = {split: folder / f"{split}.jsonl" for split in rows}
    for split, path in paths.items():
        if rows[split]:
            write_atomically(path, (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows[split]))
        else:
            path.unlink(missing_ok=True)
    return {split: path for split, path in paths.items() if rows[split]}


def _columns_without_rows(report: BidsReport, columns: Sequence[str], questions: Sequence[Question]) -> Iterator[str]:
    """A message for each requested column without a row."""
    tasks = {row["task"] for rows in report.rows.values() for row in rows}
    with_values = {question.task for question in questions}
    for column in columns:
        if column in tasks:
            continue
        if column in with_values:
            yield f"no question about {column}: no subject with a readable scan has a value"
        else:
            yield f"no question about {column}: a choice needs two different values, a number needs a valid value"


def _missing_modalities(report: BidsReport, *, test_fraction: float) -> Iterator[str]:
    modalities = {split: {scan.modality for scan in scans} for split, scans in report.scans.items()}
    for missing, other in (SPLITS, SPLITS[::-1]) if 0 < test_fraction < 1 else ():
        for modality in sorted(modalities[other] - modalities[missing]):
            num_subjects = len({scan.subject for scan in report.scans[other] if scan.modality == modality})
            yield (f"no {modality} scan in {missing}.jsonl: all {num_subjects} subjects with one are in "
                   f"{other}.jsonl; try another seed or test fraction")  # fmt: skip


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") >> (64 - _HASH_BITS)
