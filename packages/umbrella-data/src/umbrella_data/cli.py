"""The command `umbrella-data`. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbrella_data.bids_manifest import BidsReport

FROM_BIDS_HELP = """\
Finds the T1w, bold and dwi scans of a BIDS tree, reads each of them once, and writes OUT/train.jsonl and
OUT/test.jsonl: questions about each scan's own metadata, and about age and sex where participants.tsv holds them.
Subjects, never files, are dealt to the two splits by a seeded hash. Scans that cannot be read are listed, each with
its reason.

Paths in the manifests are relative to the tree: read them with data_root=ROOT (in Python: read_manifest(path,
data_root=ROOT)), or write them into the tree itself, --out ROOT, and no data_root is needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    from umbrella_data.errors import UmbrellaDataError

    try:
        return int(options.run(options))
    except (UmbrellaDataError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="umbrella-data", description="Look after the data that UMBRELLA trains on.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_from_bids(commands)
    _add_demo(commands)
    return parser


def _add_from_bids(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "from-bids",
        help="a BIDS tree to manifests",
        description=FROM_BIDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("root", type=Path, help="top folder of the BIDS tree")
    command.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    command.add_argument("--test-fraction", type=_fraction, default=0.2, help="share of subjects held out (0.2)")
    command.add_argument("--seed", type=int, default=0, help="seed of the split and of the questions' wording (0)")
    command.add_argument("--min-frames", type=int, default=0, help="leave out series with fewer frames (0)")
    command.add_argument(
        "--choice", action="append", default=[], metavar="COLUMN", help="also ask about a column of a few texts"
    )
    command.add_argument(
        "--number", action="append", default=[], metavar="COLUMN[:UNIT]", help="also ask about a column of numbers"
    )
    command.set_defaults(run=_from_bids)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("demo", help="write the demo cohort: synthetic scans with known answers")
    command.add_argument("--out", type=Path, required=True, help="folder for the cohort")
    command.add_argument("--num-train", type=int, default=300, help="subjects to learn from (300)")
    command.add_argument("--num-test", type=int, default=64, help="subjects held out (64)")
    command.add_argument("--seed", type=int, default=0, help="seed of the cohort (0)")
    command.set_defaults(run=_demo)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def _from_bids(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from umbrella_data.bids_manifest import write_manifests

    report = write_manifests(
        options.root,
        out=options.out,
        test_fraction=options.test_fraction,
        seed=options.seed,
        min_frames=options.min_frames,
        choices=options.choice,
        numbers={column: unit or None for column, _, unit in (text.partition(":") for text in options.number)},
        progress=lambda scans: tqdm(scans, desc="reading scans", unit="scan"),
    )
    _print_report(report)
    if not report.manifests:
        print(f"error: no readable scan below {options.root}", file=sys.stderr)
        return 1
    print("\nwrote, to be read with data_root:")
    for path in report.manifests.values():
        print(f"  - manifest: {path.resolve()}\n    data_root: {options.root.resolve()}")
    return 0


def _print_report(report: BidsReport) -> None:
    print(f"{'split':8}{'modality':10}{'scans':>6}")
    for split, scans in report.scans.items():
        for modality, count in sorted(Counter(scan.modality for scan in scans).items()):
            print(f"{split:8}{modality:10}{count:6}")
    for split, rows in report.rows.items():
        print(f"{split}: {len({row['subject'] for row in rows})} subjects, {len(rows)} rows")
    for note in report.notes:
        print(f"note: {note}")
    print(f"scans that cannot be used: {len(report.unreadable)}")
    for error in report.unreadable:
        print(f"  {error}")


def _demo(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from umbrella_data.synthetic import make_demo_cohort

    total = options.num_train + options.num_test
    with tqdm(total=total, desc="writing the demo cohort", unit="subject") as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        cohort = make_demo_cohort(
            options.out,
            num_train=options.num_train,
            num_test=options.num_test,
            seed=options.seed,
            progress=show,
        )
    print(f"wrote {cohort.train_manifest} and {cohort.test_manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
