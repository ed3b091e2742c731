"""`umbrella-data from-bids`: manifests from a BIDS tree."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.cli.arguments import (
    add_b_limits,
    add_modalities,
    add_non_finite,
    add_shard,
    add_workers,
    choose_parts,
)
from umbrella_data.cli.output import print_shard, print_warnings, show

if TYPE_CHECKING:
    from umbrella_data.bids.manifests import BidsReport

SUMMARY = "manifests from a BIDS tree"
HELP = """\
Finds the T1w, UNIT1, bold and dwi scans and the FA and MD maps of a BIDS tree, reads each of them once, and writes
OUT/train.jsonl and OUT/test.jsonl: questions about each scan's own metadata, and about age and sex where
participants.tsv has them.

Of bold series, tasks whose label starts with rest are used, or those given by --task. The echoes of one run are one
scan. Images with contrast agent (ce-) are left out, and a DWI with ready maps. --task, --session, --run, --acquisition,
--echo, --reconstruction and --contrast take a label (rest or task-rest; '*' takes any) and may be repeated; each
applies to the modalities that have such labels in the tree. --filter reads the JSON file that fMRIPrep and QSIPrep take
as --bids-filter-file. --exclude reads a list with one subject (sub-01), session (sub-01/ses-02) or file a line. What is
left out is counted by reason.

A tree of derivatives (fMRIPrep, QSIPrep) is taken as ROOT itself; of several versions of a scan one is used,
desc-preproc in the subject's own space, or as given by --space and --desc. A brain mask next to it
(desc-brain_mask) is written into the manifest: the model then sees 0 outside of the brain. --no-masks ignores masks.
Subjects, never files, are assigned to the two splits by a seeded hash. Unreadable scans are listed with the reason
(the first 5 of missing files and of links out of ROOT); so are the first ones of each warning, such as a header
without orientation (no_form).

participants.json describes columns: Units (ages are converted to years), Levels (their words are the answers), codes
for missing values. A visit has the labels of its line: participants.tsv with session_id, or sub-*_sessions.tsv. Values
that are left out are counted: declared as missing (participants.json, --missing), no Level, an age outside 0 to 120
years, or -9, -99, -999, -9999, 999, 9999 outside the range of the other values of the column.

Paths in the manifests are relative to the tree: read them with data_root=ROOT (in Python: read_manifest(path,
data_root=ROOT)), or write them into the tree itself with --out ROOT. Links to files outside of ROOT need --data-root,
a folder that contains ROOT and these files; paths are then relative to it. Links to folders are not followed.

--shard I/N reads the scans of one of N parts of the subjects only, in a job of its own; the same command with --merge
then writes the manifests that one job would have written."""
_SELECTING = {
    "task": "only series of this task (default: tasks whose label starts with rest)",
    "session": "only this session",
    "run": "only this run",
    "acquisition": "only this acquisition (acq)",
    "echo": "this echo of a run (default: the middle one)",
    "reconstruction": "this reconstruction (rec) of a scan (default: the one without rec)",
    "contrast": "only images with this contrast agent (ce) (default: without)",
}
# If the contents of a tree were not fetched, thousands of files have the same problem.
_MAX_ALIKE = 5


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = command.add_argument
    add("root", type=Path, help="top folder of the BIDS tree")
    add("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    add(
        "--data-root",
        type=Path,
        help="folder that paths are relative to and no link leads out of; ROOT is in it (default: ROOT)",
    )
    add(
        "--test-fraction",
        type=_fraction,
        default=0.2,
        help="fraction of subjects held out (0.2); 1 writes test.jsonl alone",
    )
    add("--seed", type=int, default=0, help="seed of the split and of the questions' wording (0)")
    add("--min-frames", type=int, default=0, help="leave out series with fewer frames (0)")
    add("--choice", action="append", default=[], metavar="COLUMN", help="also ask about a column of a few texts")
    add("--number", action="append", default=[], metavar="COLUMN[:UNIT]", help="also ask about a column of numbers")
    add("--question", action="append", metavar="TASK", help="only questions of this task, such as age (default: all)")
    add(
        "--missing",
        action="append",
        default=[],
        metavar="[COLUMN=]VALUE",
        help="a value of the tables that means missing, in every column or in one: --missing -9 --missing dx=88",
    )
    add_modalities(command)
    for option, text in _SELECTING.items():
        # `options.run` is the function of the command.
        add(f"--{option}", dest=f"only_{option}", action="append", default=[], metavar="LABEL", help=text)
    add("--filter", type=Path, metavar="FILE", help="BIDS filter file (JSON) of fMRIPrep and QSIPrep")
    add("--exclude", type=Path, metavar="FILE", help="list of subjects, sessions and scans to leave out, one a line")
    add("--space", help="only scans in this space, such as MNI152NLin2009cAsym")
    add("--desc", help="only scans of this description, such as preproc")
    add("--no-masks", action="store_true", help="ignore brain masks next to scans")
    add(
        "--participants",
        action="append",
        type=Path,
        default=[],
        metavar="TABLE",
        help="file with the labels, .tsv or .csv; several are joined by subject and session (default: the tree's "
        "participants.tsv)",
    )
    add_b_limits(command)
    add_non_finite(command)
    add_workers(command)
    add_shard(command)


def run(options: argparse.Namespace) -> int:
    """Read the tree and write the manifests."""
    from umbrella_data.bids.manifests import write_manifests
    from umbrella_data.bids.selection import Selection

    report = write_manifests(
        options.root,
        out=options.out,
        data_root=options.data_root,
        test_fraction=options.test_fraction,
        seed=options.seed,
        min_frames=options.min_frames,
        choices=options.choice,
        numbers={column: unit or None for column, _, unit in (text.partition(":") for text in options.number)},
        questions=options.question,
        missing=options.missing,
        modalities=options.modality,
        selection=Selection(
            labels={option: getattr(options, f"only_{option}") for option in _SELECTING},
            filter_file=options.filter,
            exclude_file=options.exclude,
        ),
        space=options.space,
        desc=options.desc,
        with_masks=not options.no_masks,
        participants=options.participants,
        max_b=options.max_b,
        b0_threshold=options.b0_threshold,
        non_finite=options.non_finite,
        num_workers=options.workers,
        parts=choose_parts(options, command="from-bids"),
        progress=lambda results, total: show(results, total, "reading scans", "scan"),
    )
    if options.shard:
        num_scans = sum(map(len, report.scans.values())) + len(report.unreadable)
        print_shard(options.shard, num_scans=num_scans, errors=report.unreadable)
        return 0
    _print_report(report)
    if not report.manifests:
        print(f"error: no readable scan below {options.root}; see the lists above", file=sys.stderr)
        return 1
    data_root = options.root if options.data_root is None else options.data_root
    print("\nwrote, to be read with data_root:")
    for path in report.manifests.values():
        print(f"  - manifest: {path.resolve()}\n    data_root: {data_root.resolve()}")
    if "train" not in report.manifests and options.test_fraction < 1:
        print("error: no subject is in train; try another --seed, or a smaller --test-fraction", file=sys.stderr)
        return 1
    return 0


def _print_report(report: BidsReport) -> None:
    from umbrella_data.errors import ScanReason

    print(f"{'split':8}{'modality':10}{'scans':>6}")
    for split, scans in report.scans.items():
        for modality, count in sorted(Counter(scan.modality for scan in scans).items()):
            print(f"{split:8}{modality:10}{count:6}")
    for split, rows in report.rows.items():
        print(f"{split}: {len({row['subject'] for row in rows})} subjects, {len(rows)} rows")
    for message in report.messages:
        print(f"note: {message}")
    print_warnings(report.warnings)
    print(f"\nunusable scans: {len(report.unreadable)}")
    shown: Counter[str] = Counter()
    for error in report.unreadable:
        # Other problems are listed for every file.
        kind = error.message if error.reason in (ScanReason.MISSING, ScanReason.UNREADABLE) else str(error)
        shown[kind] += 1
        if shown[kind] <= _MAX_ALIKE:
            print(f"  {error}")
    for kind, count in shown.items():
        if count > _MAX_ALIKE:
            print(f"  and {count - _MAX_ALIKE:,} more: {kind}")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value
