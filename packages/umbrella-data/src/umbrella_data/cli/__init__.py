"""The command `umbrella-data`, one file per subcommand. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from umbrella_data import __version__
from umbrella_data.cli import cache, check, demo, from_bids, preview, whois
from umbrella_data.cli.completion import add_completion
from umbrella_data.cli.exit_codes import ExitCode
from umbrella_data.cli.output import add_quiet, show_no_other_progress

COMMANDS = {
    "check": check,
    "preview": preview,
    "from-bids": from_bids,
    "cache": cache,
    "demo": demo,
    "whois": whois,
}
"""Each module has SUMMARY, HELP, add_arguments() and run()."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            # Also after --help: otherwise a closed pipe, as of `head`, raises when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.CLOSED_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    show_no_other_progress()
    from umbrella_data.errors import UmbrellaDataError
    from umbrella_data.progress import show_progress

    show_progress(not options.quiet)

    try:
        return int(options.run(options))
    except (UmbrellaDataError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.PROBLEMS
    except OSError as error:
        from umbrella_data.files.faults import describe_os_error

        message = describe_os_error(error, folder=getattr(options, "out", None))
        if message is None or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        return ExitCode.ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="umbrella-data", description="Validate, convert, preview and cache the data that UMBRELLA trains on."
    )
    parser.add_argument("--version", action="version", version=f"umbrella-data {__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        add_quiet(command)
        command.set_defaults(run=module.run)
    return parser
