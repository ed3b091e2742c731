"""Foreign manifest rows: one adapter function a dialect turns them into the canonical form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def to_canonical(row: Any) -> Any:
    """Turn a row of any known dialect into a canonical one; a canonical row is returned as it is.

    Raises:
        ValueError: If the row belongs to no dialect.
    """
    if isinstance(row, Mapping) and "messages" not in row:
        raise ValueError("the row has no 'messages'; it belongs to no known dialect")
    return row
