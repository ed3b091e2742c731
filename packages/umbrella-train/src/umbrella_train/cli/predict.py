"""The command umbrella-predict."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from umbrella_data.manifest.sample import Scan
from umbrella_train.cli.options import DATA_ROOT_HELP, positive
from umbrella_train.command import errors_as_messages, make_parser, print_text, set_up_output
from umbrella_train.errors import RunError
from umbrella_train.run_folder import check_output, json_line, write_lines


@errors_as_messages()
def predict_command(arguments: Sequence[str] | None = None) -> None:
    """Ask a trained model a question about scans, or the questions of manifests."""
    parser = make_parser(
        "umbrella-predict",
        "Ask a trained model a question about scans (--question, --scan), or the questions of all rows of manifests "
        "(--manifest). Nothing is written to the run's folder.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run or of a model, as in RUN/model")
    parser.add_argument(
        "--scan",
        type=read_scan,
        action="append",
        default=[],
        metavar="MODALITY=FILE",
        help="a scan; can be repeated, in reading order. Precomputed maps: MODALITY=FILE,FILE",
    )
    parser.add_argument(
        "--mask", type=Path, action=_MaskOfLastScan, metavar="FILE", help="brain mask of the --scan before it"
    )
    parser.add_argument("--question", help="the question")
    parser.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="FILE",
        help="ask the questions of all rows instead, and print a line of JSON for each; can be repeated. Rows may end "
        "with the user's turn, and need no 'answer'",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help=DATA_ROOT_HELP)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write these lines to a file; an existing one is replaced"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows of a manifest in a batch (default: 4)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer in tokens (32)"
    )
    parser.add_argument("--use-cpu", action="store_true", help="use the CPU even if there is a GPU")
    options = parser.parse_args(arguments)

    # Options of the other way to ask.
    unused = ("question", "scan") if options.manifest else ("data_root", "out", "batch_size")
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name)]
    if given and options.manifest:
        raise RunError(
            f"{', '.join(given)} cannot be combined with --manifest, whose rows have the questions and scans"
        )
    if given:
        raise RunError(f"{', '.join(given)} needs --manifest")
    set_up_output(is_quiet=options.quiet, has_messages=False)
    if options.manifest:
        _answer_manifests(options)
        return
    if options.question is None:
        raise RunError("there is no question; give --question, or --manifest")
    for scan in options.scan:
        for path in (*scan.paths, *([] if scan.mask is None else [scan.mask])):
            if not path.exists():
                raise FileNotFoundError(f"{path}: there is no such file")
    from umbrella_train.assembly.predict import predict  # late: imports torch

    answer = predict(
        options.run,
        question=options.question,
        scans=options.scan,
        max_new_tokens=options.max_new_tokens,
        device="cpu" if options.use_cpu else None,
    )
    print(answer)


def _answer_manifests(options: argparse.Namespace) -> None:
    """Print the answers to the rows of manifests, or write them to a file."""
    if options.out is not None:
        check_output(options.out, inputs=options.manifest)
    from umbrella_train.assembly.answer_manifests import answer_manifests  # late: imports torch

    rows = answer_manifests(
        options.run,
        options.manifest,
        data_root=options.data_root,
        batch_size=options.batch_size or 4,
        max_new_tokens=options.max_new_tokens,
        device="cpu" if options.use_cpu else None,
    )
    if options.out is None:
        for row in rows:
            if not print_text(json_line(row).removesuffix("\n")):
                return
    else:
        write_lines(options.out, rows)
        print(f"answers: {options.out}")


def read_scan(text: str) -> Scan:
    """A scan from `MODALITY=FILE` or `MODALITY=FILE,FILE`."""
    modality, _, files = text.partition("=")
    if not modality or not files:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODALITY=FILE, as in T1=scan.nii.gz")
    # A comma can also be part of a file name.
    paths = [Path(files)] if Path(files).exists() else [Path(name) for name in files.split(",")]
    return Scan(modality, tuple(paths))


class _MaskOfLastScan(argparse.Action):
    """Gives the last scan a mask."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if not namespace.scan or namespace.scan[-1].mask is not None:
            parser.error("--mask follows the --scan that it belongs to")
        namespace.scan[-1] = replace(namespace.scan[-1], mask=values)
