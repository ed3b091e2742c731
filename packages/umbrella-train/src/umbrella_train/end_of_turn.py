"""Where an answer ends: at the token, or the text of several, that the chat template puts behind the assistant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umbrella_data.chat.encoder import ChatEncoder


@dataclass(frozen=True)
class EndOfTurn:
    """The ends of an answer.

    Attributes:
        stop_ids: Tokens that end it, in order of their ids: end of turn, end of sequence, padding.
        text: The end of turn as text; a tokenizer that does not know it as one token writes it as several.
    """

    stop_ids: tuple[int, ...] = ()
    text: str | None = None

    def decode(self, tokens: Sequence[int], tokenizer: Any) -> str:
        """The words in front of the first end among generated tokens."""
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        words = str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))
        return (words.partition(self.text)[0] if self.text else words).strip()


def find_end_of_turn(tokenizer: Any, *, image_token_id: int) -> EndOfTurn:
    """What ends the answers of a model that was trained with this tokenizer's chat template.

    Raises:
        ValueError: If no token can end an assistant's turn.
    """
    text = ChatEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens={}).end_of_turn
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(ids if len(ids) == 1 else ())} - {None}
    return EndOfTurn(tuple(sorted(stops)), text)
