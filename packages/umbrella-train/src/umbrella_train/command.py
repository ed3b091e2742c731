"""What the commands share: options, errors as messages, and what is shown on stderr."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

from umbrella_data.cli.completion import add_completion
from umbrella_data.cli.exit_codes import ExitCode
from umbrella_data.cli.output import add_quiet, show_no_other_progress
from umbrella_data.errors import UmbrellaDataError
from umbrella_data.files.faults import describe_os_error
from umbrella_train import __version__
from umbrella_train.errors import RunError

# Errors that the user can fix: one message without a traceback, exit code 2.
_USER_ERRORS = (RunError, UmbrellaDataError, OSError)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors that the user can fix become a message on stderr and exit code 2."""
    try:
        yield
    except _USER_ERRORS as error:
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        if message is None:
            raise
        print("\n".join([f"error: {message}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        raise SystemExit(ExitCode.ERROR) from None


def make_parser(
    name: str,
    description: str,
    *,
    add_help: bool = True,
    add_keys: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.ArgumentParser:
    """A parser with `--quiet`, `--version` and `--print-completion`, which also completes what `add_keys` adds."""
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False, add_help=add_help)
    parser.add_argument("--version", action="version", version=f"{name} {__version__}")
    add_completion(parser, add_keys)
    add_quiet(parser)
    return parser


def set_up_output(*, is_quiet: bool, has_messages: bool) -> None:
    """Set what the command shows on stderr; of other libraries, only warnings.

    Without messages of this package, such as the table of a dry run, its warnings are still shown.
    """
    show_no_other_progress()
    from umbrella_data.progress import show_progress

    show_progress(not is_quiet)
    # umbrella_model reports how a checkpoint's tensors were loaded, which is the same on all ranks.
    is_first = os.environ.get("RANK", "0") == "0"
    for name, is_shown in (("umbrella_train", has_messages), ("umbrella_model", has_messages and is_first)):
        package = logging.getLogger(name)
        package.setLevel(logging.INFO if is_shown else logging.WARNING)
        package.handlers = [logging.StreamHandler(sys.stderr)]


def print_text(text: str) -> bool:
    """Print text for readers that may stop before its end, such as `less` and `head`; whether it was read."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout at exit, and would report the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
