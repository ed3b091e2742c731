"""Shapes and layouts of conversations: what is before a chat template, what it writes, and which tokens are learned.

Sentinels are texts that stand for a user's texts and scans while a chat template is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from umbrella_data.manifest.sample import REASONING_TAGS, Scan, Turn

# The shape of a conversation: for each turn its role, and a letter for each item in reading order: "s" a scan, "t" a
# text, "r" an answer that starts with its own reasoning block, "d" one whose reasoning is dropped in the history.
Shape = tuple[tuple[str, str], ...]

DROPPED = "d"

IGNORE_INDEX = -100

# Private-use characters, which no template writes or trims.
SENTINEL = "\ue000{}\ue001"
SENTINEL_PATTERN = re.compile("\ue000(\\d+)\ue001")


class AddedToken(Protocol):
    """A token outside of a tokenizer's ordinary vocabulary."""

    @property
    def content(self) -> str:
        """The token as text."""

    @property
    def special(self) -> bool:
        """Whether it is markup, such as an end of turn."""


class Tokenizer(Protocol):
    """The part of Hugging Face's fast tokenizers that is used here."""

    @property
    def is_fast(self) -> bool:
        """Whether it returns offsets."""

    @property
    def chat_template(self) -> Any:
        """The chat template, or None."""

    @property
    def eos_token(self) -> Any:
        """The end-of-sequence token, or None."""

    @property
    def unk_token_id(self) -> Any:
        """The id of the unknown token, or None."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by their ids."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a conversation."""

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Tokenise a text."""


@dataclass(frozen=True)
class Slot:
    """The place of one text or scan in the rendered conversation.

    Attributes:
        turn: Number of the turn.
        is_scan: Whether it is a scan.
        lead: Characters before an assistant's words that are learned with them: blanks that share a token with words,
            so that no prompt can end with them.
        tail: Characters after an assistant's words that end its turn, and are learned with them.
        is_learned: Whether an assistant's words are learned.
    """

    turn: int
    is_scan: bool
    lead: int = 0
    tail: int = 0
    is_learned: bool = False


Layout = tuple[str | Slot, ...]


def shape_of(messages: Sequence[Turn], contents: Sequence[Sequence[Scan | str]]) -> Shape:
    """The shape of a conversation, whose turns have these items."""
    return tuple(
        (turn.role, "r")
        if starts_with_reasoning(turn)
        else (turn.role, "".join("s" if isinstance(item, Scan) else "t" for item in content))
        for turn, content in zip(messages, contents, strict=True)
    )


def drop_reasoning(content: list[Scan | str]) -> list[Scan | str]:
    """The items of an answer without the block of reasoning that it starts with."""
    return [item.partition(REASONING_TAGS[1])[2].strip() if isinstance(item, str) else item for item in content]


def starts_with_reasoning(turn: Turn) -> bool:
    """Whether an answer has a reasoning block of its own, in place of the empty one of a template."""
    opening, closing = REASONING_TAGS
    text = turn.text.lstrip()
    return turn.role == "assistant" and text.startswith(opening) and closing in text


def first_exchange(turns: Sequence[Turn]) -> int:
    """The number of turns of the first exchange: those before the first user turn after an answer.

    Exchanges are removed as a whole: templates require that the user starts.
    """
    answered = False
    for number, turn in enumerate(turns):
        if answered and turn.role != "assistant":
            return number
        answered = answered or turn.role == "assistant"
    return len(turns)


def merge_texts(turn: Turn) -> list[Scan | str]:
    """The items of a turn with neighbouring texts joined by a newline, blanks at their ends removed."""
    merged: list[Scan | str] = []
    for item in turn.content:
        if isinstance(item, Scan):
            merged.append(item)
        elif text := item.strip():
            # Blanks at the ends could merge with those of the template into tokens that generation never gets.
            if merged and isinstance(merged[-1], str):
                merged[-1] += "\n" + text
            else:
                merged.append(text)
    return merged


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


def make_labels(
    learned: list[tuple[int, int]], ids: NDArray[np.int64], offsets: NDArray[np.int64], *, text: str
) -> NDArray[np.int64]:
    """The labels (L,) of tokens: their ids in the learned ranges of characters, and -100 elsewhere.

    Args:
        learned: Begin and end of each range.
        ids: (L,) token ids.
        offsets: (L, 2) range of characters of each token.
        text: The text.

    Raises:
        ValueError: If a token is only partly in a range.
    """
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    # Tokens of blanks may have empty ranges, which do not state their place: they belong to what is around them.
    is_solid = offsets[:, 1] > offsets[:, 0]
    solid = np.flatnonzero(is_solid)
    starts, stops = offsets[solid, 0], offsets[solid, 1]
    for begin, end in learned:
        first = solid[np.searchsorted(stops, begin, side="right")]
        if offsets[first, 0] < begin:
            raise ValueError(f"the answer {text[begin:end]!r:.40} and the end of its prompt, {text[:begin][-20:]!r}, "
                             "share a token; write the answer another way, or use a chat template with a special token "
                             "or a line break before answers")  # fmt: skip
        while text[begin].isspace() and first > 0 and not is_solid[first - 1]:
            first -= 1
        last = solid[np.searchsorted(starts, end, side="left") - 1]
        labels[first : last + 1] = ids[first : last + 1]
    return labels
