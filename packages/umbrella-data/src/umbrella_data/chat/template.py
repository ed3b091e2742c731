"""Reads a tokenizer's chat template: renders it around sentinels to find the layout of a conversation.

Texts of users never pass through the template: they cannot be confused with its markup, and the position of each in the
rendered conversation is known exactly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Protocol

logger = logging.getLogger(__name__)

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Used for a tokenizer without a chat template.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Private-use characters, which no template writes or trims.
_SENTINEL = "\ue000{}\ue001"
_SENTINEL_PATTERN = re.compile("\ue000(\\d+)\ue001")

# The shape of a conversation: for each turn its role, and "t" for each text and "s" for each scan, in reading order.
Shape = tuple[tuple[str, str], ...]


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
        tail: Characters after an assistant's words that end its turn, and are learned with them.
    """

    turn: int
    is_scan: bool
    tail: int = 0


Layout = tuple[str | Slot, ...]


class _Style(Enum):
    """The format of `content` that a template supports."""

    IMAGE_ITEMS = auto()  # lists of items; the template writes an image token for each scan
    STRING = auto()
    TEXT_ITEMS = auto()  # lists of texts


class ChatTemplate:
    """The layouts of one tokenizer's chat template, rendered once for each shape of conversation.

    Warns if ChatML is used and the tokenizer does not know its markup, and if the template writes another image token
    than the model's.

    Args:
        tokenizer: A fast tokenizer; ChatML is used if it has no chat template.
        image_token: The text of the model's image token.

    Raises:
        ValueError: If the template keeps no form of content whole, or no token can end an assistant's turn.
    """

    def __init__(self, tokenizer: Tokenizer, *, image_token: str) -> None:
        self._tokenizer = tokenizer
        self._image_token = image_token
        self.is_fallback = tokenizer.chat_template is None
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if self.is_fallback:
            _warn_of_unknown_markup(tokenizer)
            specials |= {IM_END}
        specials |= {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")
        self._layouts: dict[tuple[Shape, bool], Layout] = {}
        self._style = self._find_style()
        self._terminator = self._find_terminator()

    @property
    def end_of_turn(self) -> str:
        """What ends an assistant's turn: a special token, or ChatML's markup if the tokenizer does not know it."""
        return self._terminator or str(self._tokenizer.eos_token)

    def layout(self, shape: Shape, *, add_generation_prompt: bool) -> Layout:
        """The rendered conversation as literal text and slots, in order.

        Raises:
            ValueError: If the template drops, repeats or moves a text or scan of such a conversation.
        """
        key = (shape, add_generation_prompt)
        if key not in self._layouts:
            layout = self._render(shape, style=self._style, add_generation_prompt=add_generation_prompt)
            if layout is None:
                turns = ", ".join(role for role, _ in shape)
                raise ValueError(f"the tokenizer's chat template drops, repeats or moves a part of a conversation of "
                                 f"the turns {turns}; give the tokenizer a template that keeps all")  # fmt: skip
            self._layouts[key] = self._end_turns(layout, shape)
        return self._layouts[key]

    def _find_style(self) -> _Style:
        shape = (("user", "st"), ("assistant", "t"))
        # A template that knows no images may join a list to a string: only one that names them is given items.
        knows_images = not self.is_fallback and re.search("['\"]image['\"]", str(self._tokenizer.chat_template))
        styles = [_Style.IMAGE_ITEMS] if knows_images else []
        for style in [*styles, _Style.STRING, _Style.TEXT_ITEMS]:
            if self._render(shape, style=style, add_generation_prompt=False) is not None:
                if knows_images and style is not _Style.IMAGE_ITEMS:
                    _warn(f"the tokenizer's chat template does not write {self._image_token!r} for an image: scans "
                          "are written as that token alone, without the template's own markup of images. A "
                          "model trained with the template needs its image token as image_token_id")  # fmt: skip
                return style
        raise ValueError("the tokenizer's chat template keeps neither texts nor lists of items as a turn's content")

    def _find_terminator(self) -> str | None:
        layout = self._render((("user", "t"), ("assistant", "t")), style=self._style, add_generation_prompt=False)
        last = layout[-1] if layout else ""
        match = self._special_pattern.search(last) if isinstance(last, str) else None
        if match is None and not self._tokenizer.eos_token:
            raise ValueError("the chat template ends no assistant turn with a special token, and the tokenizer has no "
                             "eos_token to end it with")  # fmt: skip
        return match.group() if match else None

    def _render(self, shape: Shape, *, style: _Style, add_generation_prompt: bool) -> Layout | None:
        """Lay a conversation out; None if its texts and scans are not kept, once each and in order."""
        slots = [Slot(turn, is_scan=kind == "s") for turn, (_, kinds) in enumerate(shape) for kind in kinds]
        rendered = self._tokenizer.apply_chat_template(
            _sentinel_messages(shape, style=style),
            chat_template=CHATML_TEMPLATE if self.is_fallback else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        pieces = _SENTINEL_PATTERN.split(rendered)
        layout: list[str | Slot] = []
        scans = [slot for slot in slots if slot.is_scan] if style is _Style.IMAGE_ITEMS else []
        waiting = iter(scans)
        for i, piece in enumerate(pieces):
            if i % 2 == 1:
                layout.append(slots[int(piece)])
                continue
            literals = piece.split(self._image_token) if style is _Style.IMAGE_ITEMS else [piece]
            for literal in literals[:-1]:
                layout += [literal, next(waiting, Slot(-1, is_scan=True))]
            layout.append(literals[-1])
        return tuple(layout) if _keeps_all(layout, slots, moves_scans=bool(scans)) else None

    def _end_turns(self, layout: Layout, shape: Shape) -> Layout:
        """Insert the end-of-turn token directly after each assistant's text, unless the template has it there.

        A blank between the two is removed: a model that learns only the text and the token could not write it.
        """
        ended: list[str | Slot] = list(layout)
        for i, slot in enumerate(layout):
            if isinstance(slot, str) or shape[slot.turn][0] != "assistant":
                continue
            following = str(layout[i + 1])
            match = self._special_pattern.search(following)
            # Another special token belongs to the next turn, as does one that words precede.
            is_end = match is not None and match.group() == self._terminator and not following[: match.start()].strip()
            rest = following[match.end() :] if match is not None and is_end else following
            ended[i], ended[i + 1] = replace(slot, tail=len(self.end_of_turn)), self.end_of_turn + rest
        return tuple(ended)


def _warn_of_unknown_markup(tokenizer: Tokenizer) -> None:
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [markup for markup in (IM_START, IM_END) if markup not in known]
    if missing:
        _warn("the tokenizer has no chat template, so ChatML is used, but it has no token for "
              f"{' and '.join(missing)}: such markup is written as several tokens. Of {IM_END}, all of them "
              "are learned as the end of a turn, and generation has no one token to stop at. Set "
              "tokenizer.chat_template, or add the tokens with tokenizer.add_special_tokens")  # fmt: skip


@lru_cache
def _warn(message: str) -> None:
    """Warn once per process: each data set of a mixture creates a template from the same tokenizer."""
    logger.warning(message)


def _sentinel_messages(shape: Shape, *, style: _Style) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    number = 0
    for role, kinds in shape:
        sentinels = [_SENTINEL.format(number + i) for i in range(len(kinds))]
        number += len(kinds)
        if style is _Style.STRING:
            messages.append({"role": role, "content": "\n".join(sentinels)})
            continue
        items = [{"type": "text", "text": sentinel} for sentinel in sentinels]
        if style is _Style.IMAGE_ITEMS:
            items = [{"type": "image"} if kind == "s" else item for kind, item in zip(kinds, items, strict=True)]
        messages.append({"role": role, "content": items})
    return messages


def _keeps_all(layout: Sequence[str | Slot], slots: Sequence[Slot], *, moves_scans: bool) -> bool:
    found = [piece for piece in layout if isinstance(piece, Slot)]
    if not moves_scans:
        return found == list(slots)
    # LLaVA's template writes the images of a turn before its texts; the order within a turn may change.
    return all(
        [slot for slot in found if slot.is_scan is is_scan] == [slot for slot in slots if slot.is_scan is is_scan]
        for is_scan in (True, False)
    ) and [slot.turn for slot in found] == [slot.turn for slot in slots]
