"""Reads a tokenizer's chat template: renders it around sentinels to find the layout of a conversation.

Texts of users never pass through the template: they cannot be confused with its markup, and the position of each in the
rendered conversation is known exactly.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from umbrella_data.chat.layout import (
    DROPPED,
    SENTINEL,
    SENTINEL_PATTERN,
    Layout,
    Shape,
    Slot,
    Style,
    Tokenizer,
    keeps_all,
    sentinel_messages,
)
from umbrella_data.manifest.sample import REASONING_TAGS

logger = logging.getLogger(__name__)

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Used for a tokenizer without a chat template.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A block without reasoning that a template writes before an answer, in full or its end alone (DeepSeek-V3.1).
_EMPTY_BLOCK = re.compile(r"(?:<think>\s*)?</think>\s*$")
# How answers start: numbers and words, and what a few start with.
_COMMON_STARTS = ("0", "7", "a", "t", "Y", "female", "é", "脳")
_RARE_STARTS = ("-1", "+", ".5", "(", '"', "'s", "?")


class ChatTemplate:
    """The layouts of one tokenizer's chat template, rendered once for each shape of conversation.

    Warns if ChatML is used and the tokenizer does not know its markup, and if the template writes another image token
    than the model's.

    Args:
        tokenizer: A fast tokenizer; ChatML is used if it has no chat template.
        image_token: The text of the model's image token.

    Raises:
        ValueError: If the template keeps no form of content whole, writes today's date, no token can end an assistant's
            turn, or every prompt would share a token with the answer after it.
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
        self._source = self._find_source()
        self._layouts: dict[Shape, Layout] = {}
        self._leads: dict[str, int] = {}
        self._style = self._find_style()
        self._first_shape = self._find_first_shape()
        self._terminator, self._user_end = self._find_ends()
        self.layout(self._first_shape)  # every problem of the template itself is raised here

    @property
    def end_of_turn(self) -> str:
        """What ends an assistant's turn: a special token, or ChatML's markup if the tokenizer does not know it."""
        return self._terminator or str(self._tokenizer.eos_token)

    def layout(self, shape: Shape) -> Layout:
        """The rendered conversation as literal text and slots, in order.

        Raises:
            ValueError: If the template rejects such a conversation, or drops, repeats or moves a text or scan of it.
        """
        if shape not in self._layouts:
            try:
                layout = self._render(shape, style=self._style)
            except Exception as error:  # jinja2's, and whatever else the expressions of a template raise
                raise ValueError(f"the tokenizer's chat template rejects a conversation of the turns {_roles(shape)} "
                                 f"({error}); change such turns, or use another template") from error  # fmt: skip
            if layout is not None and self._asks_for_date(shape):
                raise ValueError("the tokenizer's chat template writes today's date (strftime_now), so that a model "
                                 "would be asked another text than it was trained on; write a fixed date into "
                                 "it (model.template_date of a run, umbrella_data.chat.template.pin_date)")  # fmt: skip
            if layout is None:
                raise ValueError(f"the tokenizer's chat template drops, repeats or moves a part of a conversation of "
                                 f"the turns {_roles(shape)}; use a template that keeps all")  # fmt: skip
            self._layouts[shape] = self._mark_answers(layout, shape)
        return self._layouts[shape]

    def prompt_layout(self, shape: Shape, *, answer: str = "t") -> Layout:
        """The text of `layout` for a conversation with one more answer, up to what is learned of that answer.

        The generation prompt of the template itself is not used: many differ from what the template writes before an
        answer in training, by a blank or by a block of reasoning.

        Args:
            shape: The conversation, up to the answer.
            answer: The kind of the answer, `t` or `r`.

        Raises:
            ValueError: As `layout`.
        """
        layout = self.layout((*shape, ("assistant", answer)))
        place = next(i for i, piece in enumerate(layout) if isinstance(piece, Slot) and piece.turn == len(shape))
        slot, before = layout[place], layout[place - 1]
        assert isinstance(slot, Slot)
        assert isinstance(before, str)
        return (*layout[: place - 1], before[: len(before) - slot.lead])

    @cached_property
    def drops_reasoning(self) -> bool:
        """Whether the template leaves out the reasoning of answers that are followed by another turn."""
        reasoned = f"{REASONING_TAGS[0]}\n{SENTINEL.format(0)}\n{REASONING_TAGS[1]}\n\n{SENTINEL.format(1)}"
        (user, *_), answer, last = self._first_shape, {"role": "assistant", "content": reasoned}, SENTINEL.format(2)
        (question,) = sentinel_messages((user,), style=self._style)
        try:
            text = self._write([question, answer, question, {"role": "assistant", "content": last}])
        except Exception:  # noqa: BLE001  (such a conversation is rejected where it occurs)
            return False
        return SENTINEL.format(1) in text and REASONING_TAGS[0] + "\n" + SENTINEL.format(0) not in text

    def _find_source(self) -> str | None:
        """The template's Jinja source; None if it is that of the tokenizer, whatever that is."""
        template = self._tokenizer.chat_template
        if self.is_fallback:
            return CHATML_TEMPLATE
        if not isinstance(template, Mapping):
            return None
        if "default" not in template:
            raise ValueError(f"the tokenizer has the chat templates {', '.join(template)}, and none called default; "
                             "set tokenizer.chat_template to one of them")  # fmt: skip
        return str(template["default"])

    def _find_first_shape(self) -> Shape:
        """A conversation of one question that the template accepts: with a text alone, or with a scan, too."""
        shape: Shape = (("user", "t"), ("assistant", "t"))
        try:
            self._render(shape, style=self._style)
        except Exception:  # noqa: BLE001  (it requires a scan in each question, with which its style was found)
            return (("user", "st"), ("assistant", "t"))
        return shape

    def _find_style(self) -> Style:
        shape = (("user", "st"), ("assistant", "t"))
        # A template that knows no images may join a list to a string: only one that names them is given items.
        knows_images = not self.is_fallback and re.search("['\"]image['\"]", str(self._tokenizer.chat_template))
        styles = [Style.IMAGE_ITEMS] if knows_images else []
        reason = ""
        for style in [*styles, Style.STRING, Style.TEXT_ITEMS]:
            try:
                layout = self._render(shape, style=style)
            except Exception as error:  # noqa: BLE001  (jinja2's, and whatever else a template's expressions raise)
                reason = f" ({error})"
                continue
            if layout is not None:
                if knows_images and style is not Style.IMAGE_ITEMS:
                    _warn(f"the tokenizer's chat template does not write {self._image_token!r} for an image: scans are "
                          "written as that token alone, without the template's own markup of images. A model trained "
                          "with the template needs its image token as image_token_id")  # fmt: skip
                return style
        raise ValueError("the tokenizer's chat template keeps neither texts nor lists of items as a turn's content"
                         f"{reason}; use another template")  # fmt: skip

    def _find_ends(self) -> tuple[str | None, str | None]:
        """The special tokens that end the last assistant turn and a user's turn."""
        layout = self._render(self._first_shape, style=self._style)
        user, last = (str(layout[-3]), str(layout[-1])) if layout else ("", "")
        match = self._special_pattern.search(last)
        if match is None and not self._tokenizer.eos_token:
            raise ValueError("the chat template ends no assistant turn with a special token, and the tokenizer has no "
                             "eos_token to end it with")  # fmt: skip
        marks = self._special_pattern.findall(user)
        # A single token after the user's words may open the assistant's turn instead.
        return match.group() if match else None, marks[0] if len(marks) > 1 else None

    def _write(self, messages: list[dict[str, Any]], *, before: str = "") -> str:
        """Render messages, with Jinja source in front of that of the template."""
        source = self._source
        if before:
            source = before + (str(self._tokenizer.chat_template) if source is None else source)
        return str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=False
            )
        )

    def _render(self, shape: Shape, *, style: Style) -> Layout | None:
        """Lay a conversation out; None if its texts and scans are not kept, once each and in order."""
        slots = [Slot(turn, is_scan=kind == "s") for turn, (_, kinds) in enumerate(shape) for kind in kinds]
        pieces = SENTINEL_PATTERN.split(self._write(sentinel_messages(shape, style=style)))
        layout: list[str | Slot] = []
        scans = [slot for slot in slots if slot.is_scan] if style is Style.IMAGE_ITEMS else []
        waiting = iter(scans)
        for i, piece in enumerate(pieces):
            if i % 2 == 1:
                layout.append(slots[int(piece)])
                continue
            literals = piece.split(self._image_token) if style is Style.IMAGE_ITEMS else [piece]
            for literal in literals[:-1]:
                layout += [literal, next(waiting, Slot(-1, is_scan=True))]
            layout.append(literals[-1])
        return tuple(layout) if keeps_all(layout, slots, moves_scans=bool(scans)) else None

    def _asks_for_date(self, shape: Shape) -> bool:
        """Whether the template calls `strftime_now` for a conversation that it accepts."""
        if "strftime_now" not in str(self._tokenizer.chat_template):
            return False
        try:
            # transformers passes no functions on to a template; a macro hides the function of the same name.
            before = "{%- macro strftime_now(format) -%}{{ raise_exception('date') }}{%- endmacro -%}"
            self._write(sentinel_messages(shape, style=self._style), before=before)
        except Exception:  # noqa: BLE001  (without the macro there was no error)
            return True
        return False

    def _mark_answers(self, layout: Layout, shape: Shape) -> Layout:
        """Mark what is learned of each answer, and end each with the end-of-turn token.

        A blank between words and token is removed: a model that learns words and token alone could not write it.
        An answer that is followed by another turn is learned if the template writes it, and all before it, as it does
        for the last answer of a shorter conversation: that is what the model is asked at that point.
        """
        marked: list[str | Slot] = list(layout)
        answers = [
            i for i, piece in enumerate(layout) if isinstance(piece, Slot) and shape[piece.turn][0] == "assistant"
        ]
        for i in answers:
            slot, before = marked[i], str(marked[i - 1])
            assert isinstance(slot, Slot)
            if shape[slot.turn][1] == "r":
                before = marked[i - 1] = _EMPTY_BLOCK.sub("", before)
                if REASONING_TAGS[1] in before:
                    raise ValueError("the tokenizer's chat template writes its own block of reasoning before an answer "
                                     "that has one; remove it from the answers, or use another template")  # fmt: skip
            after, is_ended = self._end_turn(str(layout[i + 1]))
            marked[i + 1] = after
            marked[i] = replace(
                slot, lead=self._num_learned_blanks(before), tail=len(self.end_of_turn), is_learned=True
            )
            own = None if slot.turn == len(shape) - 1 else self.layout(shape[: slot.turn + 1])
            is_other = shape[slot.turn][1] == DROPPED
            if is_other or not is_ended or (own is not None and own[: i + 1] != tuple(marked[: i + 1])):
                marked[i] = replace(slot, is_learned=False)
                _warn("the tokenizer's chat template writes an answer within a conversation in another way than the "
                      "last one: only the last answer of such a conversation is learned. Split conversations into rows "
                      "to learn every answer")  # fmt: skip
        return tuple(marked)

    def _end_turn(self, following: str) -> tuple[str, bool]:
        """The text after an answer with the end-of-turn token first, and whether it is there."""
        match = self._special_pattern.search(following)
        if match is None or following[: match.start()].strip():
            return self.end_of_turn + following, True
        if match.group() == self._terminator:
            return self.end_of_turn + following[match.end() :], True
        if match.group() == self._user_end:
            return following, False  # another end of turn than that of the last answer
        return self.end_of_turn + following, True  # the token belongs to the next turn

    def _num_learned_blanks(self, before: str) -> int:
        """How many blanks at the end of a text are learned with the answer after it.

        None, if the tokens of the text stay the same whatever the answer; all of them otherwise.
        """
        if before not in self._leads:
            blanks = len(before) - len(before.rstrip())
            found = [
                number
                for starts in ((*_COMMON_STARTS, *_RARE_STARTS), _COMMON_STARTS)
                for number in (0, blanks)
                if self._keeps_tokens("x" + before, starts=starts, num_learned=number)  # x: the end of a user's words
            ]
            if not found:
                raise ValueError(f"the tokenizer makes one token of the end of {before[-40:]!r}, which its chat "
                                 "template writes before an answer, and the start of the answer, so that no prompt "
                                 "equals the training text; use a template with a special token or a line break "
                                 "there")  # fmt: skip
            self._leads[before] = found[0]
        return self._leads[before]

    def _keeps_tokens(self, text: str, *, starts: Sequence[str], num_learned: int) -> bool:
        """Whether the tokens of a text without its last blanks are the first tokens of the text with any answer."""
        prompt = self._tokens(text[: len(text) - num_learned])
        return all(self._tokens(text + start)[: len(prompt)] == prompt for start in starts)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def pin_date(template: Any, date: datetime.date) -> Any:
    """Write a fixed date into a chat template that would write today's.

    Args:
        template: Jinja source with calls of `strftime_now("...")`, or several by name, as `tokenizer.chat_template`.
        date: The date to write.
    """
    if isinstance(template, Mapping):
        return {name: pin_date(source, date) for name, source in template.items()}
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(date.strftime(call[2])), str(template))


def _roles(shape: Shape) -> str:
    return ", ".join(role for role, _ in shape)


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
