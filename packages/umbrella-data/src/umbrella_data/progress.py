"""Progress of long work on stderr: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from shutil import get_terminal_size
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 10.0
"""Between two lines in a file."""
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_is_shown = True


def show_progress(is_shown: bool) -> None:
    """Whether this process shows any progress, as for `--quiet`; it does until this is called."""
    global _is_shown  # noqa: PLW0603 - one setting per process
    _is_shown = is_shown


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    words: str,
    unit: str = "it",
    initial: int = 0,
    delay: float = 0,
) -> tqdm[Any]:
    """A tqdm bar on stderr; if that is no terminal, a line at the start, every 10 seconds, and at the end.

    Only the first process of a launch shows it.

    Args:
        items: What to iterate over; without it, call `update`.
        total: Number of items; by default that of `items`.
        words: What is being done.
        unit: Name of an item.
        initial: Number of items that are already done.
        delay: Seconds until the first output.
    """
    is_hidden = not _is_shown or os.environ.get("RANK", "0") != "0"
    options: dict[str, Any] = {
        "total": total, "desc": words, "unit": unit, "initial": initial, "delay": delay, "disable": is_hidden
    }  # fmt: skip
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        # Unlike tqdm, this assumes 80 x 24 where the terminal does not report its size: tqdm would draw nothing.
        columns, rows = get_terminal_size()
        return tqdm(items, file=sys.stderr, ncols=columns, nrows=rows, **options)
    # By default tqdm measures how many items pass between two outputs, and late lines are written by a thread.
    return tqdm(items, file=_Lines(sys.stderr), bar_format=_LINE, mininterval=SECONDS_PER_LINE, miniters=1, position=0,
                **options)  # fmt: skip


class _Lines:
    """A file that turns what tqdm draws over and over into lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Write a line, unless only the cursor is moved."""
        line = text.strip()
        if line:
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        """Called by tqdm after each write."""
        self._file.flush()
