"""`--print-completion`: completion of a command's options, subcommands and files in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def add_completion(
    parser: argparse.ArgumentParser, add_keys: Callable[[argparse.ArgumentParser], None] | None = None
) -> None:
    """`--print-completion SHELL`. Further options that are completed, but not parsed, are added by `add_keys`."""

    class PrintCompletion(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, values: Any, *__: Any) -> None:
            import shtab  # late: only this option needs it

            if add_keys is not None:
                add_keys(parser)
            _complete_files(parser, shtab.FILE)
            print(shtab.complete(parser, shell=values))
            parser.exit()

    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "fish"),
        help="print a script that completes this command in the shell",
    )


def _complete_files(parser: argparse.ArgumentParser, files: Mapping[str, Any]) -> None:
    """Mark the arguments of a parser and its subcommands that are paths; shtab reads the attribute `complete`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]
