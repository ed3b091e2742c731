"""The prompt of every answer is, in tokens, what the answer was trained after."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from chat import KINDS, TEMPLATES, build_tokenizer

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.chat.template import pin_date
from umbrella_data.manifest.sample import Scan, Turn

T1 = Scan("T1", (Path("/a"),))
ANSWERS = ("41", "-3.5", "female", "a brain, the left one.\n\nNo lesion", "größer 脳")
# The template writes earlier answers in another way than the last one.
LAST_ALONE = {"Qwen3", "Qwen3 without thinking", "harmony"}


def make_encoder(kind, template):
    tokenizer = build_tokenizer(kind, template)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return tokenizer, ChatEncoder(tokenizer, image_token_id=image, num_image_tokens={"T1": 3})


def learned_answers(encoder, turns):
    """The numbers of the answers that carry labels; each is checked against its prompt."""
    trained = encoder.encode(turns)
    labels = (trained.labels != -100).nonzero().flatten().tolist()
    found = []
    for number in (i for i, turn in enumerate(turns) if turn.role == "assistant"):
        prompt = encoder.encode_prompt(turns[: number + 1]).input_ids
        is_prefix = trained.input_ids[: len(prompt)].tolist() == prompt.tolist()
        if is_prefix and len(prompt) in labels and len(prompt) - 1 not in labels:
            found.append(number)
    starts = [place for place in labels if place - 1 not in labels]
    assert len(starts) == len(found), "an answer is learned that no prompt asks for in the same tokens"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_a_prefix_of_the_training_text(kind, name):
    tokenizer, encoder = make_encoder(kind, TEMPLATES[name])
    question = Turn("user", (T1, "What is it?"))
    again = Turn("user", ("And now?",))
    for answer in ANSWERS:
        last = Turn("assistant", (answer,))
        assert learned_answers(encoder, (question, last)) == [1]
        several = (Turn("system", ("Be brief.",)), question, Turn("assistant", ("41",)), again, last)
        assert learned_answers(encoder, several) == ([4] if name in LAST_ALONE else [2, 4])
        ids = encoder.encode((question, last))
        text = tokenizer.decode(ids.labels[ids.labels != -100], clean_up_tokenization_spaces=False)
        assert text.strip() == answer + encoder.end_of_turn


@pytest.mark.parametrize("name", ["ChatML", "Qwen3", "Qwen3 without thinking", "GLM", "DeepSeek"])
def test_reasoning_in_an_answer_is_kept_once(name):
    tokenizer, encoder = make_encoder("byte level", TEMPLATES[name])
    answer = "<think>\nThe ventricles are wide.\n</think>\n\n71"
    turns = (Turn("user", (T1, "How old?")), Turn("assistant", (answer,)))
    text = tokenizer.decode(encoder.encode(turns).input_ids, clean_up_tokenization_spaces=False)
    assert answer in text
    assert (text.count("<think>"), text.count("</think>")) == (1, 1)
    assert learned_answers(encoder, turns) == [1]


def test_prompt_holds_the_empty_block_that_training_text_holds():
    tokenizer, encoder = make_encoder("byte level", TEMPLATES["Qwen3"])
    prompt = encoder.encode_prompt((Turn("user", ("How old?",)),))
    assert tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


DATED = "{% set today = strftime_now('%d %b %Y') %}{{ today }}\n" + TEMPLATES["ChatML"]


def test_template_when_it_writes_the_date_is_rejected():
    with pytest.raises(ValueError, match="strftime_now"):
        make_encoder("byte level", DATED)


def test_template_when_its_date_is_pinned_writes_that_date():
    tokenizer, encoder = make_encoder("byte level", pin_date(DATED, datetime.date(2024, 7, 26)))
    encoded = encoder.encode((Turn("user", ("How old?",)), Turn("assistant", ("41",))))
    assert tokenizer.decode(encoded.input_ids).startswith("26 Jul 2024\n")


def test_template_when_answers_share_a_token_with_it_is_rejected():
    # Digits are not split, and nothing is between the digit of the markup and the answer.
    template = "{% for m in messages %}{{ m.role }} 3{{ m.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="one token"):
        make_encoder("byte level", template)


@pytest.mark.parametrize("template", ["{{ messages[0].content.nothing.more }}</s>", "{{ 'a' + 1 }}"])
def test_template_when_it_fails_on_every_conversation_is_rejected(template):
    with pytest.raises(ValueError, match="chat template"):
        make_encoder("byte level", template)


def test_conversation_that_the_template_rejects_names_its_turns():
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    _, encoder = make_encoder("byte level", check + TEMPLATES["ChatML"])
    turns = (Turn("system", ("Be exact.",)), Turn("user", ("Where?",)), Turn("assistant", ("left",)))
    encoder.encode(turns[1:])
    with pytest.raises(ValueError, match=r"system, user, assistant \(no system\)"):
        encoder.encode(turns)
