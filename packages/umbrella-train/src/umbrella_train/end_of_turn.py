"""How answers are generated, and their end: the token or text with which the chat template ends an assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umbrella_data.chat.encoder import ChatEncoder

GREEDY: Mapping[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    **dict.fromkeys((
        "bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "sequence_bias", "watermarking_config",
        "exponential_decay_length_penalty", "min_length", "min_new_tokens", "stop_strings",
        "dola_layers", "penalty_alpha", "return_dict_in_generate",
    )),
}  # fmt: skip
"""Options of `generate` for the most probable answer, whatever the `generation_config` of the language model says.

A repetition penalty would count the words of the question, among them the possible answers."""


@dataclass(frozen=True)
class EndOfTurn:
    """What ends an answer.

    Attributes:
        stop_ids: Sorted ids of the tokens that end it: end of turn, end of sequence, padding.
        text: The end of turn as text, for a tokenizer that splits it into several tokens.
    """

    stop_ids: tuple[int, ...] = ()
    text: str | None = None

    def decode(self, tokens: Sequence[int], tokenizer: Any) -> str:
        """The text of generated tokens before the first end."""
        end = next((position for position, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        text = str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))
        return (text.partition(self.text)[0] if self.text else text).strip()


def find_end_of_turn(tokenizer: Any, *, image_token_id: int) -> EndOfTurn:
    """The end of answers of a model that was trained with this tokenizer's chat template.

    Raises:
        ValueError: If no token can end an assistant's turn.
    """
    text = ChatEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens={}).end_of_turn
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(ids if len(ids) == 1 else ())} - {None}
    return EndOfTurn(tuple(sorted(stops)), text)
