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


# As Qwen3 and DeepSeek-V3.1: the reasoning of answers before the last question is left out.
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% elif m.role == 'assistant' and '<think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
REASONED = "<think>\nThe ventricles are wide.\n</think>\n\n"


def test_reasoning_is_dropped_from_the_history_as_the_template_does():
    tokenizer, encoder = make_encoder("byte level", DROPS_REASONING)
    turns = (Turn("user", (T1, "Is it female?")), Turn("assistant", (REASONED + "female",)), Turn("user", ("Age?",)),
             Turn("assistant", (REASONED + "41",)))  # fmt: skip
    encoded = encoder.encode(turns)
    own = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in (Turn("user", ("Is it female?",)), *turns[1:])],
        tokenize=False,
    )
    text = tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False)
    text = text.replace("<image>" * 3 + "\n", "")
    assert text.strip() == own.strip()
    assert learned_answers(encoder, turns) == [3]
    _, keeps = make_encoder("byte level", TEMPLATES["ChatML"])
    assert learned_answers(keeps, turns) == [1, 3]


@pytest.mark.parametrize("name", ["ChatML", "Qwen3", "DeepSeek"])
def test_prompt_without_an_answer_asks_for_reasoning_if_training_did(name):
    tokenizer, _ = make_encoder("byte level", TEMPLATES[name])
    image = tokenizer.convert_tokens_to_ids("<image>")
    question, answer = Turn("user", (T1, "How old?")), Turn("assistant", (REASONED + "71",))
    encoder = ChatEncoder(tokenizer, image_token_id=image, num_image_tokens={"T1": 3}, asks_for_reasoning=True)
    asked = encoder.encode_prompt((question,)).input_ids.tolist()
    assert asked == encoder.encode_prompt((question, answer)).input_ids.tolist()
    assert encoder.encode((question, answer)).input_ids[: len(asked)].tolist() == asked


def test_prompt_drops_the_turns_that_training_drops():
    _, encoder = make_encoder("byte level", TEMPLATES["ChatML"])
    turns = (Turn("system", ("Be brief.",)), Turn("user", (T1, "Is it female?")), Turn("assistant", ("female",)),
             Turn("user", ("And how old?",)), Turn("assistant", ("41 years",)))  # fmt: skip
    whole = len(encoder.encode(turns).input_ids)
    for max_length in (whole, whole - 1, whole - 3):
        trained = encoder.encode(turns, max_length=max_length)
        asked = encoder.encode_prompt(turns, max_length=max_length)
        assert trained.input_ids[: len(asked.input_ids)].tolist() == asked.input_ids.tolist()
        assert trained.num_dropped_turns == asked.num_dropped_turns == (0 if max_length == whole else 2)


@pytest.mark.parametrize(
    "call",
    ["{{ strftime_now('%Y-%m-%d').split('-')[2] }}", "{% if strftime_now('%H')|int < 12 %}Good morning{% endif %}",
     "{{ strftime_now('%d %b')[3:].upper() }}", "{% set day = strftime_now('%A') %}{{ day }}"],
)  # fmt: skip
@pytest.mark.parametrize("is_named", [False, True])
def test_template_when_it_uses_the_date_in_any_way_is_rejected_until_it_is_pinned(call, is_named):
    source = call + TEMPLATES["ChatML"]
    template = {"default": source, "tool_use": TEMPLATES["ChatML"]} if is_named else source
    with pytest.raises(ValueError, match="strftime_now"):
        make_encoder("byte level", template)
    make_encoder("byte level", pin_date(template, datetime.date(2024, 7, 26)))


def test_templates_by_name_without_a_default_are_rejected():
    with pytest.raises(ValueError, match="tool_use"):
        make_encoder("byte level", {"tool_use": TEMPLATES["ChatML"]})


@pytest.mark.parametrize("condition", ["m.content[0].type != 'image'", "1 // (m.content|length - 1) == 0"])
def test_template_that_needs_an_image_is_used_for_rows_with_one(condition):
    check = ("{% for m in messages if m.role == 'user' %}{% if " + condition
             + " %}{{ raise_exception('no image') }}{% endif %}{% endfor %}")  # fmt: skip
    _, encoder = make_encoder("byte level", check + TEMPLATES["ChatML"])
    turns = (Turn("user", (T1, "How old?")), Turn("assistant", ("41",)))
    assert learned_answers(encoder, turns) == [1]
    with pytest.raises(ValueError, match="chat template"):
        encoder.encode((Turn("user", ("How old?",)), turns[1]))


def test_own_block_around_the_answer_is_rejected():
    template = ("{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
                "<think>\n\n</think>\n<answer>{{ m.content }}</s>{% endif %}{% endfor %}")  # fmt: skip
    _, encoder = make_encoder("byte level", template)
    with pytest.raises(ValueError, match="reasoning"):
        encoder.encode((Turn("user", ("How old?",)), Turn("assistant", (REASONED + "71",))))


def test_answer_whose_reasoning_is_dropped_is_not_learned_without_it():
    template = DROPS_REASONING.replace("<think>\n\n</think>\n\n{{ m.content }}", "{{ m.content }}")
    _, encoder = make_encoder("byte level", template)
    question = Turn("user", (T1, "Is it female?"))
    turns = (question, Turn("assistant", (REASONED + "female",)), Turn("user", ("Age?",)), Turn("assistant", ("41",)))
    assert learned_answers(encoder, turns) == [3]
    assert learned_answers(encoder, (question, Turn("assistant", ("female",)), *turns[2:])) == [1, 3]
