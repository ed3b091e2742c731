"""Shapes and layouts of conversations, and the part of a tokenizer that determines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from umbrella_data.manifest.sample import REASONING_TAGS, Scan, Turn

# The shape of a conversation: for each turn its role, and a letter for each item in reading order: "s" a scan, "t" a
# text, "r" an answer that starts with its own reasoning block, "d" one whose reasoning is dropped in the history.
Shape = tuple[tuple[str, str], ...]

DROPPED = "d"


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
