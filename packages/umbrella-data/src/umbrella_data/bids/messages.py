"""Messages about skipped files and values: one for each kind, with a count and the first five items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

_MAX_NAMED = 5


class MessageList:
    """Skipped items, grouped by kind: in a tree of a thousand subjects, a thousand may be of one kind."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, item: str) -> None:
        """Add an item, such as a path, to a kind, such as `links to folders, not followed`."""
        self._items[kind].append(item)

    def __iter__(self) -> Iterator[str]:
        """One message for each kind, in the order of their first items."""
        return (f"{kind}: {len(items):,} ({first_of(items)})" for kind, items in self._items.items())


def first_of(items: Sequence[str]) -> str:
    """The first five items, and how many more there are."""
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")
