"""The commands umbrella-train, -eval, -predict and -report. None of them imports torch to parse its arguments."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from umbrella_data.errors import UmbrellaDataError
from umbrella_train.config import RunConfig, load_config
from umbrella_train.config.overrides import describe_keys
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.score_table import score_table

T = TypeVar("T")

# What the person at the keyboard can mend: told in one message, exit code 2. Anything else keeps its traceback.
_USER_ERRORS = (RunError, UmbrellaDataError, FileNotFoundError, PermissionError, NotADirectoryError)

_OPTIONS = ("config", "dry-run", "resume", "help")
_TRAIN_USAGE = "umbrella-train [--config FILE] [--dry-run] [--resume auto|FOLDER] [--section.key VALUE ...]"


def train_command(arguments: Sequence[str] | None = None) -> None:
    """Train from a configuration; without one, the demo."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser("umbrella-train", "Train a model from a configuration file; without one, run the demo.")
    parser.usage = _TRAIN_USAGE
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (default: the packaged demo)")
    parser.add_argument("--dry-run", action="store_true", help="two steps, with a table of tokens and memory")
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="go on from the newest good checkpoint: of the newest run of this name, or of this folder, which may also "
        "be a checkpoint",
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this help, with every key of the configuration")
    options, overrides = parser.parse_known_args(words)
    if options.help:
        # The keys of an override may be wrong here: what is asked for is help.
        config = _or_exit(lambda: load_config(options.config))
        source = options.config or "the demo"
        _print_long(
            f"{parser.format_help()}\nKeys to override, with the values of {source}:\n\n{describe_keys(config)}"
        )
        return
    _or_exit(lambda: _check_words(overrides))
    config = _or_exit(lambda: load_config(options.config, overrides, to_run=True))

    def train() -> Path | None:
        from umbrella_train.run import training as run  # late: imports torch

        _show_messages()
        try:
            return run.train(config, dry_run=options.dry_run, resume=options.resume)
        except RunStoppedError as stopped:
            print(stopped, file=sys.stderr)
            # As a shell reports a process that a signal ended: what was to follow on success must not begin. A launcher
            # that starts failed processes anew would begin another run.
            is_restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
            raise SystemExit(0 if is_restarted else 128 + stopped.signal_number) from None

    folder = _or_exit(train)
    if folder is not None and os.environ.get("RANK", "0") == "0":
        report = folder / "report.html"
        print(f"run folder: {folder}" + (f"\nreport: {report}" if report.exists() else ""))


def eval_command(arguments: Sequence[str] | None = None) -> None:
    """Score a trained model again, on its own held-out subjects or on another manifest."""
    parser = _parser(
        "umbrella-eval",
        "Score a trained model on its held-out subjects, or on other manifests. The whole evaluation is added to the "
        "run's files; with --manifest, --max-samples, or without the run's controls, nothing is written.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/demo")
    parser.add_argument(
        "--manifest", type=Path, action="append", help="a manifest to score on instead; may be repeated"
    )
    parser.add_argument("--data-root", type=Path, help="the folder that the manifest's paths are relative to")
    parser.add_argument(
        "--no-controls", action="store_true", help="leave out shuffled, swapped and absent scans; nothing is written"
    )
    parser.add_argument(
        "--max-samples", type=int, metavar="N", help="questions to ask, a set of modalities; nothing is written"
    )
    parser.add_argument("--json", action="store_true", help="print every metric as JSON in place of the table")
    parser.add_argument("--help", "-h", action="help", help="show this help")
    options = parser.parse_args(arguments)

    def evaluate() -> dict[str, float]:
        _check_is_run(options.run)
        from umbrella_train.run import training as run  # late: imports torch

        _show_messages()
        return run.evaluate_run(
            options.run,
            manifests=options.manifest,
            data_root=options.data_root,
            controls=False if options.no_controls else None,
            max_samples=options.max_samples,
        )

    metrics = _or_exit(evaluate)
    print(json.dumps(metrics, indent=1) if options.json else score_table(metrics))


def predict_command(arguments: Sequence[str] | None = None) -> None:
    """Ask a trained model a question about scans."""
    parser = _parser("umbrella-predict", "Ask a trained model a question about scans; nothing is written.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one with a model, as in RUN/model")
    parser.add_argument(
        "--scan",
        type=_read_scan,
        action="append",
        default=[],
        metavar="MODALITY=FILE",
        help="a scan; may be repeated, in reading order. Ready maps: MODALITY=FILE,FILE",
    )
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer in tokens")
    parser.add_argument("--use-cpu", action="store_true", help="stay on the CPU though there is a GPU")
    parser.add_argument("--help", "-h", action="help", help="show this help")
    options = parser.parse_args(arguments)

    def answer() -> str:
        for _, paths in options.scan:
            for path in paths:
                if not path.exists():
                    raise FileNotFoundError(f"{path}: there is no such file")
        from umbrella_train.assembly.predict import predict  # late: imports torch

        return predict(
            options.run,
            question=options.question,
            scans=options.scan,
            max_new_tokens=options.max_new_tokens,
            device="cpu" if options.use_cpu else None,
        )

    print(_or_exit(answer))


def _read_scan(text: str) -> tuple[str, list[Path]]:
    modality, _, files = text.partition("=")
    if not modality or not files:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODALITY=FILE, as in T1=scan.nii.gz")
    # A comma may also be part of a file's name.
    return modality, [Path(files)] if Path(files).exists() else [Path(name) for name in files.split(",")]


def report_command(arguments: Sequence[str] | None = None) -> None:
    """Write the report again, of one run or of several side by side."""
    parser = _parser("umbrella-report", "Write report.html from the files of one run, or of several to compare.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; it may have crashed")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (default: in RUN, or beside the first)"
    )
    parser.add_argument("--help", "-h", action="help", help="show this help")
    options = parser.parse_args(arguments)

    def report() -> Path:
        for run in options.runs:
            _check_is_run(run)
        from umbrella_train.report import build_report  # late: imports matplotlib

        return build_report(options.runs, output=options.output)

    print(_or_exit(report))


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False, add_help=False)


def _show_messages() -> None:
    """Show the messages of the run, such as the table of a dry run; other libraries keep to warnings."""
    # What became of a checkpoint's tensors is the same on every rank: the first one tells it.
    is_first = os.environ.get("RANK", "0") == "0"
    for name, is_shown in (("umbrella_train", True), ("umbrella_model", is_first)):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO if is_shown else logging.WARNING)
        package.handlers = [logging.StreamHandler(sys.stderr)]


def _print_long(text: str) -> None:
    """Print what a reader may leave before its end, as `less` and `head` do."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_words(words: Sequence[str]) -> None:
    """Refuse what is meant for this command and not for the configuration: a file without --config, a mistyped option.

    Raises:
        RunError: With what was meant.
    """
    if words and not words[0].startswith("-"):
        hint = f"; a configuration is named with --config {words[0]}" if words[0].endswith((".yaml", ".yml")) else ""
        raise RunError(f"{words[0]}: does not follow a --key{hint}")
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if name != word and "." not in name and name.replace("-", "_") not in RunConfig.model_fields:
            near = difflib.get_close_matches(name, [*_OPTIONS, *RunConfig.model_fields], n=1)
            if near and near[0] in _OPTIONS:
                raise RunError(f"--{name}: no such option; did you mean --{near[0]}?")


def _check_is_run(folder: Path) -> None:
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder}: not a run's folder (it has no config.yaml)")


def _or_exit(work: Callable[[], T]) -> T:
    try:
        return work()
    except _USER_ERRORS as error:
        _exit(error)


def _exit(error: Exception) -> NoReturn:
    print("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    raise SystemExit(2) from None
