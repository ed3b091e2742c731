"""Tokens of possible answers to a prompt, to compare their probabilities under a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.chat.layout import IGNORE_INDEX, starts_with_reasoning
from umbrella_data.manifest.sample import Turn


def encode_candidates(
    encoder: ChatEncoder, messages: Sequence[Turn], candidates: Sequence[str], *, max_length: int | None = None
) -> list[tuple[int, ...]] | None:
    """The tokens of each candidate: those that follow the prompt in a training text with this answer, up to its end.

    Args:
        encoder: Encodes the conversation.
        messages: The turns; a last turn of the assistant is replaced.
        candidates: Texts of the assistant's last turn.
        max_length: As for `ChatEncoder.encode_prompt`.

    Returns:
        Token ids of each candidate with its end-of-turn token; None if the prompt asks for reasoning before the answer,
        since a candidate does not follow it directly.

    Raises:
        ValueError: As `ChatEncoder.encode`; or a candidate does not follow the tokens of the prompt.
    """
    is_answered = messages[-1].role == "assistant"
    if starts_with_reasoning(messages[-1]) if is_answered else encoder.asks_for_reasoning:
        return None
    prompt = encoder.encode_prompt(messages, max_length=max_length)
    first = 1 if messages[0].role == "system" else 0
    asked = messages[:-1] if is_answered else messages
    kept = [*asked[:first], *asked[first + prompt.num_dropped_turns :]]
    start = len(prompt.input_ids)
    found = []
    for candidate in candidates:
        whole = encoder.encode([*kept, Turn("assistant", (candidate,))])
        is_learned = whole.labels[start:] != IGNORE_INDEX
        if not torch.equal(whole.input_ids[:start], prompt.input_ids) or not bool(is_learned[:1].all()):
            raise ValueError(f"the answer {candidate!r:.60} does not follow the tokens of its prompt; use another chat "
                             "template (tokenizer.chat_template)")  # fmt: skip
        end = start + int(is_learned.nonzero()[-1]) + 1
        found.append(tuple(whole.input_ids[start:end].tolist()))
    return found
