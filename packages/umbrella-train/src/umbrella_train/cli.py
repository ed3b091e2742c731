"""The commands umbrella-train, -eval, -predict and -report. None of them imports torch to parse its arguments."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from umbrella_data.errors import did_you_mean
from umbrella_data.manifest.sample import Scan
from umbrella_train.baselines.table import baseline_table
from umbrella_train.command import errors_as_messages, make_parser, print_text, set_up_output
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.score_table import score_table
from umbrella_train.exit_guard import last_call
from umbrella_train.run_folder import RunFolder, check_output, json_line, write_lines
from umbrella_train.stop_signals import ended_by_signals

_DATA_ROOT_HELP = "the folder that paths in the manifests are relative to (default: each manifest's own)"
_OPTIONS = ("config", "dry-run", "resume", "allow-changed", "max-time", "quiet", "version", "help")
_TRAIN_USAGE = "umbrella-train [--config FILE] [--dry-run] [--resume auto|FOLDER] [--quiet] [--section.key VALUE ...]"


def train_command(arguments: Sequence[str] | None = None) -> None:
    """Train from a configuration; without one, the demo."""
    with contextlib.nullcontext() if arguments is not None else last_call():
        _train(arguments)


@errors_as_messages()
def _train(arguments: Sequence[str] | None) -> None:
    parser = make_parser(
        "umbrella-train", "Train a model from a configuration file; without one, run the demo.", add_help=False
    )
    parser.usage = _TRAIN_USAGE
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (default: the packaged demo)")
    parser.add_argument("--dry-run", action="store_true", help="two steps, with a table of tokens and memory")
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="resume from the newest valid checkpoint: of the newest run of this name (auto; a new run if there is "
        "nothing to resume), or of this folder, which may also be a checkpoint",
    )
    parser.add_argument(
        "--allow-changed",
        type=_names,
        default=[],
        metavar="KEY,...",
        help="keys and sections of the configuration that may differ from those of the checkpoint, as in "
        "data,trainer.learning_rate; ranks: the number of processes",
    )
    parser.add_argument(
        "--max-time",
        type=_duration,
        metavar="TIME",
        help="save and stop before this time has passed, as in 1-12:00:00 (days), 2:30:00 or 900 (seconds); a SLURM "
        "job's end is known without it",
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this help, with every key of the configuration")
    options, overrides = parser.parse_known_args(arguments)
    from umbrella_train.config import load_config
    from umbrella_train.config.overrides import describe_keys

    if options.help:
        # Overrides are ignored here, so that help is shown even if they are wrong.
        keys = describe_keys(load_config(options.config))
        source = options.config or "the demo"
        print_text(f"{parser.format_help()}\nKeys to override, with the values of {source}:\n\n{keys}")
        return
    if options.allow_changed and options.resume is None:
        raise RunError("--allow-changed needs --resume")
    _check_words(overrides)
    # A lost connection between ranks is an error with a message; torch would also print a warning with C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with ended_by_signals():
        config = load_config(options.config, overrides, to_run=True)
        from umbrella_train.run import training as run  # late: imports torch

    # The tables of a dry run are its result.
    set_up_output(is_quiet=options.quiet, has_messages=options.dry_run or not options.quiet)
    try:
        folder = run.train(
            config,
            dry_run=options.dry_run,
            resume=options.resume,
            allow_changed=options.allow_changed,
            max_time=options.max_time,
        )
    except RunStoppedError as stopped:
        print(stopped, file=sys.stderr)
        # As in a shell: 128 plus the signal, so that commands after "&&" do not start. But a launcher that restarts
        # failed processes would start another run.
        is_restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        raise SystemExit(0 if is_restarted else 128 + stopped.signal_number) from None
    if folder is not None and os.environ.get("RANK", "0") == "0":
        report = folder / "report.html"
        print(f"run folder: {folder}" + (f"\nreport: {report}" if report.exists() else ""))


@errors_as_messages()
def eval_command(arguments: Sequence[str] | None = None) -> None:
    """Score a trained model on its held-out subjects or on other manifests."""
    parser = make_parser(
        "umbrella-eval",
        "Score a trained model on its held-out subjects, or on other manifests. A complete evaluation is added to the "
        "run's files, which do not change with --manifest, --max-samples, or without the run's controls.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/demo")
    parser.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="FILE",
        help="a manifest to score on instead; can be repeated. Rows may end with the user's turn",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help=_DATA_ROOT_HELP)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the answers to all rows to this file (JSON Lines), scored where the row has an 'answer'; ids and "
        "subjects are those of the manifest. An existing file is replaced",
    )
    parser.add_argument(
        "--no-controls",
        action="store_true",
        help="omit shuffled, swapped and absent scans; the run's files do not change",
    )
    parser.add_argument(
        "--max-samples",
        type=_positive,
        metavar="N",
        help="questions per set of modalities, those with an 'answer' first; the run's files do not change",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also train simple models on the run's training data, and score them on the same rows: constant answer, "
        "text without scan, linear models on a small volume and on an intensity histogram, a small CNN",
    )
    parser.add_argument(
        "--segmentations",
        type=Path,
        metavar="DIR",
        help="with --baselines: a folder of BIDS derivatives, for a linear model on region volumes of *_dseg.nii.gz",
    )
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON instead of the table")
    options = parser.parse_args(arguments)

    if options.data_root and not options.manifest:
        raise RunError("--data-root needs --manifest")
    if options.segmentations and not options.baselines:
        raise RunError("--segmentations needs --baselines")
    RunFolder.open(options.run)
    from umbrella_train.run import evaluation  # late: imports torch

    set_up_output(is_quiet=options.quiet, has_messages=not options.quiet)
    metrics = evaluation.evaluate_run(
        options.run,
        manifests=options.manifest,
        data_root=options.data_root,
        controls=False if options.no_controls else None,
        max_samples=options.max_samples,
        out=options.out,
        baselines=options.baselines,
        segmentations=options.segmentations,
    )
    if options.json:
        print(json.dumps(metrics, indent=1))
        return
    tables = [table for table in (score_table(metrics), baseline_table(metrics)) if table]
    if tables:
        print("\n\n".join(tables))


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
        type=_read_scan,
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
    parser.add_argument("--data-root", type=Path, metavar="DIR", help=_DATA_ROOT_HELP)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write these lines to a file; an existing one is replaced"
    )
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="rows of a manifest in a batch (default: 4)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=32, metavar="N", help="longest answer in tokens (32)"
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return number


def _names(text: str) -> list[str]:
    return [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]


def _duration(text: str) -> float:
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d\d):)?(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, as in 1-12:00:00, 2:30:00 or 900")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _read_scan(text: str) -> Scan:
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


@errors_as_messages()
def report_command(arguments: Sequence[str] | None = None) -> None:
    """Write the report of one run, or of several to compare."""
    parser = make_parser("umbrella-report", "Write report.html from the files of one run, or of several to compare.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; also of a crashed run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (default: in RUN, or next to the first RUN)"
    )
    options = parser.parse_args(arguments)

    from umbrella_train.report import build_report  # late: imports matplotlib

    print(build_report(options.runs, output=options.output))


def _check_words(words: Sequence[str]) -> None:
    """Reject overrides that are meant as options of the command: a file without --config, a misspelt option.

    Raises:
        RunError: With the likely option.
    """
    from umbrella_train.config import RunConfig

    if words and not words[0].startswith("-"):
        hint = f"; did you mean --config {words[0]}?" if words[0].endswith((".yaml", ".yml")) else ""
        raise RunError(f"{words[0]}: does not follow a --key{hint}")
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if name != word and "." not in name and name.replace("-", "_") not in RunConfig.model_fields:
            meant = did_you_mean(f"--{name}", [f"--{option}" for option in (*_OPTIONS, *RunConfig.model_fields)])
            if any(f"'--{option}'" in meant for option in _OPTIONS):
                raise RunError(f"--{name}: no such option{meant}")
