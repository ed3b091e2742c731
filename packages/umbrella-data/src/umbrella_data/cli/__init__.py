"""The command `umbrella-data`, one file a sub-command. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from umbrella_data.cli import cache, check, demo, from_bids, preview, whois

COMMANDS = (check, preview, from_bids, cache, demo, whois)


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
    for command in COMMANDS:
        command.add_command(commands)
    return parser
