"""Notes about many files or values: one line for all of a kind, with their number and the first ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

_MAX_NAMED = 5


class NoteList:
    """What was passed over, by kind: a tree of a thousand subjects may have a thousand of one kind."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, item: str) -> None:
        """Note one.

        Args:
            kind: Of what there may be many, in words: `links to folders, not followed`.
            item: Which one.
        """
        self._items[kind].append(item)

    def sentences(self) -> tuple[str, ...]:
        """One sentence a kind, in the order in which they were first noted."""
        return tuple(f"{kind}: {len(items):,} ({first_of(items)})" for kind, items in self._items.items())


def first_of(items: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")
