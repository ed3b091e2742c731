"""The command `umbrella-data`, one file a sub-command. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from umbrella_data.cli import cache, check, demo, from_bids, preview, whois

COMMANDS = (check, preview, from_bids, cache, demo, whois)


# A path that was typed wrong. Any other error of the system keeps its traceback.
_PATH_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            # Also the words of --help: a reader who is gone, as `head` is, would be noticed too late to be kept quiet.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # As a shell reports it: not everything was said, or done.
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    from umbrella_data.errors import UmbrellaDataError

    try:
        return int(options.run(options))
    except (UmbrellaDataError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except _PATH_ERRORS as error:
        words = f"{error.filename}: {error.strerror}" if error.filename is not None else error
        print(f"error: {words}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="umbrella-data", description="Look after the data that UMBRELLA trains on.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
