"""Encoding of conversations: token ids, and labels for the assistant's texts and their end-of-turn tokens only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from umbrella_data.chat.layout import (
    DROPPED,
    Layout,
    Shape,
    Slot,
    Tokenizer,
    drop_reasoning,
    first_exchange,
    make_labels,
    merge_texts,
    shape_of,
    starts_with_reasoning,
)
from umbrella_data.chat.template import CHATML_TEMPLATE, IM_END, IM_START, ChatTemplate
from umbrella_data.manifest.sample import REASONING_TAGS, Scan, Turn

__all__ = ["CHATML_TEMPLATE", "ChatEncoder", "EncodedConversation", "Tokenizer", "encode_conversation", "encode_prompt"]


@dataclass(frozen=True)
class EncodedConversation:
    """Tokens and labels of a conversation.

    Attributes:
        input_ids: (L,) int64; each scan is a run of the image token.
        labels: (L,) int64; -100 except at the assistant's texts and their end-of-turn tokens.
        scans: The scans in reading order.
        scan_starts: First position of each scan's run.
        num_dropped_turns: Turns removed from the front to meet `max_length`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    scans: tuple[Scan, ...]
    scan_starts: tuple[int, ...]
    num_dropped_turns: int = 0


@dataclass(frozen=True)
class _Chat:
    """A rendered conversation with the character ranges of its parts."""

    text: str
    words: list[tuple[int, int]]  # the texts of all turns
    learned: list[tuple[int, int]]  # the assistant's texts with the end of their turns
    scan_places: list[int]
    scans: list[Scan]


class ChatEncoder:
    """Encodes conversations for one tokenizer and one model.

    Args:
        tokenizer: A Hugging Face fast tokenizer, or anything like it. ChatML is used if it has no chat template;
            its `<|im_start|>` and `<|im_end|>` should then be added tokens.
        image_token_id: The model's image token, an added token of the tokenizer.
        num_image_tokens: Number of positions of a scan, by modality.
        asks_for_reasoning: Whether the answers of training start with a block of reasoning: where an answer is not
            given, a prompt then ends before such a block.

    Attributes:
        num_image_tokens: As given.
        asks_for_reasoning: As given.

    Raises:
        ValueError: If the tokenizer returns no offsets, or the image token is not one of its added tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        image_token_id: int,
        num_image_tokens: Mapping[str, int],
        asks_for_reasoning: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer returns no offsets; load a fast one (AutoTokenizer with use_fast=True)")
        added = dict(tokenizer.added_tokens_decoder)
        if image_token_id not in added:
            raise ValueError(f"image_token_id {image_token_id} is not an added token of the tokenizer; add one with "
                             "tokenizer.add_special_tokens")  # fmt: skip
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._image_token = added[image_token_id].content
        self.num_image_tokens = dict(num_image_tokens)
        self.asks_for_reasoning = asks_for_reasoning
        self._template = ChatTemplate(tokenizer, image_token=self._image_token)
        markup = {token_id for token_id, token in added.items() if token.special} - {tokenizer.unk_token_id}
        # A lookup table of the ids up to the last markup, and one False for all others: faster than a search.
        self._is_markup = np.zeros(max(markup | {image_token_id}) + 2, dtype=bool)
        self._is_markup[sorted(markup | {image_token_id})] = True

    @property
    def fingerprint(self) -> str | None:
        """A hash of everything that determines the tokens of a conversation; None without a Rust backend."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        facts = [backend.to_str(), str(self._tokenizer.chat_template), str(self._tokenizer.eos_token)]
        return hashlib.sha256("\0".join([*facts, self._image_token]).encode()).hexdigest()[:16]

    @property
    def end_of_turn(self) -> str:
        """The text at the end of the assistant's turns, which is learned with them.

        One special token, at which generation stops; but several tokens if the tokenizer has no chat template and no
        token `<|im_end|>`. Generation does not stop at these: cut generated text there.
        """
        return self._template.end_of_turn

    def encode(self, messages: Sequence[Turn], *, max_length: int | None = None) -> EncodedConversation:
        """Encode a conversation for training.

        Args:
            messages: The turns.
            max_length: Maximum number of positions; whole exchanges are removed from the front to meet it.

        Raises:
            ValueError: If the last exchange alone is longer than `max_length`, if all answers are empty, if a text
                contains markup of the chat template, or if a modality has no number of image tokens.
        """
        return self._encode_within(messages, max_length=max_length, prompt_for=None)

    def encode_prompt(self, messages: Sequence[Turn], *, max_length: int | None = None) -> EncodedConversation:
        """Encode a conversation for generation, without its last turn if that is the assistant's.

        The tokens are the first ones of what `encode` gives for the same conversation, and its first label of the last
        answer follows them. All labels are -100. Arguments and errors are those of `encode`.
        """
        if messages[-1].role != "assistant":
            answer = "r" if self.asks_for_reasoning else "t"
            return self._encode_within(messages, max_length=max_length, prompt_for=answer)
        answer = "r" if starts_with_reasoning(messages[-1]) else "t"
        if max_length is None:
            return self._encode_within(messages[:-1], max_length=None, prompt_for=answer)
        # The same turns are dropped as in training, where the answer takes room.
        num_dropped = self._encode_within(messages, max_length=max_length, prompt_for=None).num_dropped_turns
        first = 1 if messages[0].role == "system" else 0
        kept = [*messages[:first], *messages[first + num_dropped : -1]]
        return replace(self._encode_within(kept, max_length=None, prompt_for=answer), num_dropped_turns=num_dropped)

    def count_text_tokens(self, conversations: Sequence[Sequence[Turn]]) -> NDArray[np.int64]:
        """The number of text tokens of each of N conversations, (N,) int64, tokenised in one batch.

        Texts that `encode` would reject are counted, too.

        Raises:
            ValueError: If the chat template or the tokenizer rejects one of the conversations.
        """
        texts: list[str] = []
        num_scans = np.array([sum(len(turn.scans) for turn in messages) for messages in conversations], dtype=np.int64)
        for messages in conversations:
            contents, shape = self._parse(messages, is_prompt=False)
            layout = self._template.layout(shape)
            texts.append(self._fill(layout, contents, shape).text)
        with _errors_of_tokenizers():
            return np.array([len(ids) for ids in self._encode_texts(texts)], dtype=np.int64) - num_scans

    def _encode_texts(self, texts: list[str]) -> Sequence[Sized]:
        backend = self._backend()
        if backend is None:
            encodings: Sequence[Sized] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return encodings
        # Faster: without offsets and lists of Python integers.
        return cast("Sequence[Sized]", backend.encode_batch_fast(texts, add_special_tokens=False))

    def _encode_text(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The token ids (L,) of a text, and the character range (L, 2) of each."""
        backend = self._backend()
        if backend is None:
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        else:
            encoded = backend.encode(text, add_special_tokens=False)
            ids, offsets = encoded.ids, encoded.offsets
        return np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def _backend(self) -> Any:
        """The Rust tokenizer of a Hugging Face tokenizer; None if it would pad or truncate."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None or backend.padding is not None or backend.truncation is not None else backend

    def _encode_within(
        self, messages: Sequence[Turn], *, max_length: int | None, prompt_for: str | None
    ) -> EncodedConversation:
        kept, num_dropped = list(messages), 0
        while True:
            with _errors_of_tokenizers():
                encoded = self._encode_all(kept, prompt_for=prompt_for, num_dropped_turns=num_dropped)
            if max_length is None or len(encoded.input_ids) <= max_length:
                return encoded
            first = 1 if kept[0].role == "system" else 0
            num_leaving = first_exchange(kept[first:])
            rest = kept[first + num_leaving :]
            if not any(turn.role == ("user" if prompt_for else "assistant") for turn in rest):
                raise ValueError(f"the last exchange alone takes {len(encoded.input_ids)} positions, more than "
                                 f"max_length {max_length}; scans are never cut")  # fmt: skip
            del kept[first : first + num_leaving]
            num_dropped += num_leaving

    def _encode_all(
        self, messages: list[Turn], *, prompt_for: str | None, num_dropped_turns: int
    ) -> EncodedConversation:
        """Encode all turns; `prompt_for` is the kind of the answer that a prompt asks for, None for training."""
        contents, shape = self._parse(messages, is_prompt=prompt_for is not None)
        template = self._template
        layout = template.prompt_layout(shape, answer=prompt_for) if prompt_for else template.layout(shape)
        chat = self._fill(layout, contents, shape)
        ids, offsets = self._encode_text(chat.text)
        self._check_words(chat, ids, offsets)
        scan_positions = np.flatnonzero(ids == self._image_token_id)
        self._check_scans(chat, offsets[scan_positions])
        if not prompt_for and not chat.learned:
            raise ValueError("no turn of the assistant has a word, so there is nothing to learn; give it an answer "
                             "that is more than blanks")  # fmt: skip
        labels = make_labels([] if prompt_for else chat.learned, ids, offsets, text=chat.text)
        return self._expand(ids, labels, scan_positions, chat.scans, num_dropped_turns)

    def _parse(self, messages: Sequence[Turn], *, is_prompt: bool) -> tuple[list[list[Scan | str]], Shape]:
        """The items of each turn, and the shape; without the reasoning of answers where the template drops it."""
        contents = [merge_texts(turn) for turn in messages]
        shape = list(shape_of(messages, contents))
        history = range(len(messages) if is_prompt else len(messages) - 1)
        reasoned = [number for number in history if shape[number] == ("assistant", "r")]
        for number in reasoned if reasoned and self._template.drops_reasoning else ():
            contents[number], shape[number] = drop_reasoning(contents[number]), ("assistant", DROPPED)
        return contents, tuple(shape)

    def _fill(self, layout: Layout, contents: list[list[Scan | str]], shape: Shape) -> _Chat:
        """Fill the slots of a layout with texts and image tokens."""
        # The template may write the scans of a turn before its texts: each kind is taken in its own order.
        texts = [iter([item for item in content if isinstance(item, str)]) for content in contents]
        scans = [iter([item for item in content if isinstance(item, Scan)]) for content in contents]
        chat, parts, position = _Chat("", [], [], [], []), [], 0
        for piece in layout:
            part = piece if isinstance(piece, str) else self._image_token if piece.is_scan else next(texts[piece.turn])
            if isinstance(piece, Slot) and piece.is_scan:
                chat.scan_places.append(position)
                chat.scans.append(next(scans[piece.turn]))
            elif isinstance(piece, Slot):
                is_reasoned = shape[piece.turn][1] == "r"
                # The tags of an answer's reasoning are the template's markup.
                begin = position + (part.rindex(REASONING_TAGS[1]) + len(REASONING_TAGS[1]) if is_reasoned else 0)
                chat.words.append((begin, position + len(part)))
                if piece.is_learned:
                    chat.learned.append((position - piece.lead, position + len(part) + piece.tail))
            parts.append(part)
            position += len(part)
        return _Chat("".join(parts), chat.words, chat.learned, chat.scan_places, chat.scans)

    def _check_words(self, chat: _Chat, ids: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        """Reject texts with markup: it could end a turn, or be replaced by features of a scan."""
        for start, stop in offsets[self._is_markup[np.minimum(ids, len(self._is_markup) - 1)]]:
            if any(start < end and stop > begin for begin, end in chat.words):
                raise ValueError(f"a text contains {chat.text[start:stop]!r}, a special token of the tokenizer; "
                                 "rephrase it, and give scans as items of type image")  # fmt: skip
        if self._template.is_fallback:  # its markup may not be special tokens
            for begin, end in chat.words:
                if any(markup in chat.text[begin:end] for markup in (IM_START, IM_END)):
                    raise ValueError(f"the text {chat.text[begin:end]!r:.80} contains {IM_START} or {IM_END}, markup "
                                     "of the chat template; rephrase it")  # fmt: skip

    def _check_scans(self, chat: _Chat, offsets: NDArray[np.int64]) -> None:
        found = [any(start <= place < stop for start, stop in offsets) for place in chat.scan_places]
        if len(offsets) != len(chat.scan_places) or not all(found):
            raise ValueError(f"the chat has {len(chat.scan_places)} scans, but tokenises to {len(offsets)} image "
                             f"tokens {self._image_token!r}; use a tokenizer that keeps it as one token")  # fmt: skip

    def _expand(
        self,
        ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        scan_positions: NDArray[np.int64],
        scans: list[Scan],
        num_dropped_turns: int,
    ) -> EncodedConversation:
        """Repeat the image token of each scan to the number of tokens of its modality."""
        repeats = np.ones(len(ids), dtype=np.int64)
        for position, scan in zip(scan_positions, scans, strict=True):
            if scan.modality not in self.num_image_tokens:
                raise ValueError(f"no number of image tokens for modality {scan.modality!r}; num_image_tokens has "
                                 f"{', '.join(self.num_image_tokens) or 'none'}")  # fmt: skip
            repeats[position] = self.num_image_tokens[scan.modality]
        starts = np.cumsum(repeats) - repeats
        return EncodedConversation(
            input_ids=torch.from_numpy(np.repeat(ids, repeats)),
            labels=torch.from_numpy(np.repeat(labels, repeats)),
            scans=tuple(scans),
            scan_starts=tuple(int(start) for start in starts[scan_positions]),
            num_dropped_turns=num_dropped_turns,
        )


@contextmanager
def _errors_of_tokenizers() -> Iterator[None]:
    """Tokenizers raise errors of any class; what is caught as a ValueError gets the row that it is about."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the tokenizer fails on this conversation ({type(error).__name__}: {error})") from error


def encode_conversation(
    messages: Sequence[Turn],
    *,
    tokenizer: Tokenizer,
    image_token_id: int,
    num_image_tokens: Mapping[str, int],
    max_length: int | None = None,
) -> EncodedConversation:
    """Encode one conversation; for many, create one `ChatEncoder`."""
    encoder = ChatEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens=num_image_tokens)
    return encoder.encode(messages, max_length=max_length)


def encode_prompt(
    messages: Sequence[Turn],
    *,
    tokenizer: Tokenizer,
    image_token_id: int,
    num_image_tokens: Mapping[str, int],
    max_length: int | None = None,
) -> EncodedConversation:
    """Encode one prompt for generation; for many, create one `ChatEncoder`."""
    encoder = ChatEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens=num_image_tokens)
    return encoder.encode_prompt(messages, max_length=max_length)
