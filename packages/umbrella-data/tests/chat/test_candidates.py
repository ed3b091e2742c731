"""Tokens of possible answers follow the prompt as in training."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("transformers")

from chat import KINDS, TEMPLATES, build_tokenizer

from umbrella_data.chat.candidates import encode_candidates
from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.manifest.sample import Turn


@pytest.fixture
def make_encoder():
    def make(kind="byte level", template="ChatML", **options):
        tokenizer = build_tokenizer(kind, TEMPLATES[template])
        return ChatEncoder(
            tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), num_image_tokens={}, **options
        )

    return make


@pytest.mark.parametrize(("template", "kind"), list(product(TEMPLATES, KINDS)))
def test_a_prompt_with_a_candidate_is_the_training_text_with_that_answer(make_encoder, template, kind):
    encoder = make_encoder(kind, template)
    earlier = [Turn("user", ("One?",)), Turn("assistant", ("yes",))]
    for turns in ([], earlier):
        asked = [*turns, Turn("user", ("Which side?",))]
        for messages in (asked, [*asked, Turn("assistant", ("other words",))]):
            found = encode_candidates(encoder, messages, ["left", "41 years"])
            prompt = encoder.encode_prompt([*asked, Turn("assistant", ("left",))]).input_ids.tolist()
            for answer, tokens in zip(("left", "41 years"), found, strict=True):
                whole = encoder.encode([*asked, Turn("assistant", (answer,))])
                learned = (whole.labels != -100).nonzero().max() + 1
                assert [*prompt, *tokens] == whole.input_ids[:learned].tolist()
                assert len(tokens) > 1


def test_an_answer_after_reasoning_has_no_candidates(make_encoder):
    reasoned = Turn("assistant", ("<think>\nIt is dark.\n</think>\nleft",))
    asked = [Turn("user", ("Which side?",))]
    assert encode_candidates(make_encoder(), [*asked, reasoned], ["left"]) is None
    assert encode_candidates(make_encoder(asks_for_reasoning=True), asked, ["left"]) is None
    assert encode_candidates(make_encoder(), asked, ["left"]) is not None


def test_turns_that_the_prompt_drops_are_dropped(make_encoder):
    encoder = make_encoder()
    asked = [Turn("user", ("x" * 50,)), Turn("assistant", ("yes",)), Turn("user", ("Which side?",))]
    longest = len(encoder.encode([Turn("user", ("Which side?",)), Turn("assistant", ("left",))]).input_ids)
    prompt = encoder.encode_prompt([*asked, Turn("assistant", ("left",))], max_length=longest)
    assert prompt.num_dropped_turns == 2
    found = encode_candidates(encoder, [*asked, Turn("assistant", ("left",))], ["right"], max_length=longest)
    assert found == encode_candidates(encoder, asked[-1:], ["right"])
