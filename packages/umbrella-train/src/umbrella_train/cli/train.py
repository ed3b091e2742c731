"""The command umbrella-train."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.errors import did_you_mean
from umbrella_train.cli.options import positive
from umbrella_train.command import errors_as_messages, make_parser, print_text, set_up_output
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.exit_guard import last_call
from umbrella_train.stop_signals import ended_by_signals

if TYPE_CHECKING:
    from umbrella_train.config import RunConfig

_OPTIONS = (
    *("config", "folds", "fold", "stage", "dry-run", "resume", "allow-changed", "max-time", "quiet", "version", "help"),
    "print-completion",
)
_TRAIN_USAGE = (
    "umbrella-train [--config FILE] [--folds N [--fold K]] [--stage NAME] [--dry-run] [--resume auto|FOLDER] "
    "[--quiet] [--section.key VALUE ...]"
)


def train_command(arguments: Sequence[str] | None = None) -> None:
    """Train from a configuration; without one, the demo."""
    with contextlib.nullcontext() if arguments is not None else last_call():
        _train(arguments)


@errors_as_messages()
def _train(arguments: Sequence[str] | None) -> None:
    parser = make_parser(
        "umbrella-train",
        "Train a model from a configuration file; without one, run the demo.",
        add_help=False,
        add_keys=_add_keys,
    )
    parser.usage = _TRAIN_USAGE
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (default: the packaged demo)")
    parser.add_argument(
        "--folds",
        type=positive,
        metavar="N",
        help="cross-validation: split data.train by subject into N folds, train a model for each, test it on the "
        "subjects of its fold, and pool the answers of all; --resume auto continues",
    )
    parser.add_argument("--fold", type=positive, metavar="K", help="with --folds: train only this one, from 1 to N")
    parser.add_argument(
        "--stage", metavar="NAME", help="of a configuration with stages: train only this one, from the one before"
    )
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
    if options.fold is not None and options.folds is None:
        raise RunError("--fold needs --folds")
    if options.stage is not None and options.folds is not None:
        raise RunError("--stage cannot be combined with --folds; remove one of them")
    _check_words(overrides)
    # A lost connection between ranks is an error with a message; torch would also print a warning with C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with ended_by_signals():
        config = load_config(options.config, overrides, to_run=True)
        train = _trainer_of(config, options)
    # The tables of a dry run are its result.
    set_up_output(is_quiet=options.quiet, has_messages=options.dry_run or not options.quiet)
    try:
        folder = train(
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


def _trainer_of(config: RunConfig, options: argparse.Namespace) -> Callable[..., Path | None]:
    """The function that trains one run, its folds or its stages. Imports torch."""
    if options.folds is not None:
        from umbrella_train.run.folds import train_folds

        return partial(train_folds, num_folds=options.folds, fold=options.fold)
    if config.stages or options.stage is not None:
        from umbrella_train.run.stages import train_stages

        return partial(train_stages, stage=options.stage)
    from umbrella_train.run.training import train

    return train


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Add every key of the configuration, for completion."""
    from umbrella_data.modality import MODALITIES
    from umbrella_train.config import RunConfig
    from umbrella_train.config.schema import dotted_keys, is_sequence, is_switch, words_of

    for key, annotation in dotted_keys(RunConfig, tables=MODALITIES):
        # A switch needs no value, and a list takes several.
        many = "*" if is_sequence(annotation) else "?" if is_switch(annotation) else None
        kind = Path if annotation is Path else str
        parser.add_argument(f"--{key}", nargs=many, choices=words_of(annotation) or None, type=kind)


def _names(text: str) -> list[str]:
    return [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]


def _duration(text: str) -> float:
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d\d):)?(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, as in 1-12:00:00, 2:30:00 or 900")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


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
