"""Sentinels: texts that stand for a user's texts and scans while a chat template is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from umbrella_data.chat.layout import Shape, Slot

# Private-use characters, which no template writes or trims.
SENTINEL = "\ue000{}\ue001"
SENTINEL_PATTERN = re.compile("\ue000(\\d+)\ue001")


class Style(Enum):
    """The format of `content` that a template supports."""

    IMAGE_ITEMS = auto()  # lists of items; the template writes an image token for each scan
    STRING = auto()
    TEXT_ITEMS = auto()  # lists of texts


def sentinel_messages(shape: Shape, *, style: Style) -> list[dict[str, Any]]:
    """A conversation of this shape for a chat template, with a numbered sentinel for each text and scan."""
    messages: list[dict[str, Any]] = []
    number = 0
    for role, kinds in shape:
        sentinels = [SENTINEL.format(number + i) for i in range(len(kinds))]
        number += len(kinds)
        if style is Style.STRING:
            messages.append({"role": role, "content": "\n".join(sentinels)})
            continue
        items = [{"type": "text", "text": sentinel} for sentinel in sentinels]
        if style is Style.IMAGE_ITEMS:
            items = [{"type": "image"} if kind == "s" else item for kind, item in zip(kinds, items, strict=True)]
        messages.append({"role": role, "content": items})
    return messages


def keeps_all(layout: Sequence[str | Slot], slots: Sequence[Slot], *, moves_scans: bool) -> bool:
    """Whether a rendered layout has all slots once and in order; scans may move within a turn if `moves_scans`."""
    found = [piece for piece in layout if isinstance(piece, Slot)]
    if not moves_scans:
        return found == list(slots)
    # LLaVA's template writes the images of a turn before its texts; the order within a turn may change.
    return all(
        [slot for slot in found if slot.is_scan is is_scan] == [slot for slot in slots if slot.is_scan is is_scan]
        for is_scan in (True, False)
    ) and [slot.turn for slot in found] == [slot.turn for slot in slots]
