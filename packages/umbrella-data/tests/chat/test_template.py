"""Layouts of chat templates: every text and scan once and in order, or the template is rejected."""

from __future__ import annotations

import pytest

from umbrella_data.chat import template as chat_template_module
from umbrella_data.chat.layout import Slot
from umbrella_data.chat.template import ChatTemplate

# As in llava-hf/llava-1.5-7b-hf: images of a turn first, no end-of-turn token.
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As in Qwen2-VL: strings or items, images in place.
QWEN_VL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision|><image><|vision|>{% elif 'text' in item %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Llama 3: trimmed strings.
LLAMA = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# Lists of texts only.
TEXT_ITEMS = (
    "{% for message in messages %}[{{ message['role'] }}]{% for item in message['content'] %}{{ item['text'] }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONVERSATION = (("user", "sts"), ("assistant", "t"), ("user", "t"), ("assistant", "t"))


@pytest.fixture(autouse=True)
def _warnings_are_new():
    chat_template_module._warn.cache_clear()


def slots(layout):
    return [piece for piece in layout if isinstance(piece, Slot)]


@pytest.mark.parametrize("template", [None, QWEN_VL, LLAMA, TEXT_ITEMS], ids=["ChatML", "QwenVL", "Llama", "items"])
def test_layout_keeps_texts_and_scans_in_reading_order(make_tokenizer, template):
    specials = ("<image>", "<|vision|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|start|>", "<|end|>", "</s>")
    layout = ChatTemplate(make_tokenizer(template, specials=specials), image_token="<image>").layout(CONVERSATION)
    assert [(slot.turn, slot.is_scan) for slot in slots(layout)] == [
        (0, True), (0, False), (0, True), (1, False), (2, False), (3, False),
    ]  # fmt: skip


def test_layout_when_the_template_writes_images_first_follows_it(make_tokenizer):
    layout = ChatTemplate(make_tokenizer(LLAVA), image_token="<image>").layout(CONVERSATION)
    assert [slot.is_scan for slot in slots(layout)[:3]] == [True, True, False]


def test_layout_keeps_the_image_markup_of_the_template(make_tokenizer):
    template = ChatTemplate(
        make_tokenizer(QWEN_VL, specials=("<image>", "<|vision|>", "<|im_start|>", "<|im_end|>")), image_token="<image>"
    )
    layout = template.layout((("user", "st"), ("assistant", "t")))
    assert layout[0] == "<|im_start|>user\n<|vision|>"
    assert layout[2] == "<|vision|>"


def test_image_token_of_the_model_replaces_another_one_of_the_template(make_tokenizer):
    tokenizer = make_tokenizer(LLAVA, specials=("<image>", "<|scan|>", "</s>"))
    layout = ChatTemplate(tokenizer, image_token="<|scan|>").layout((("user", "st"), ("assistant", "t")))
    assert [slot.is_scan for slot in slots(layout)] == [True, False, False]
    assert "<image>" not in "".join(piece for piece in layout if isinstance(piece, str))


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "<|im_end|>"), (LLAMA, "<|eot|>"), (TEXT_ITEMS, "</s>"), (LLAVA, "</s>")],
    ids=["ChatML", "Llama", "items", "LLaVA, which has none"],
)
def test_end_of_turn_is_that_of_the_template_or_else_the_eos_token(make_tokenizer, template, end):
    tokenizer = make_tokenizer(template, specials=("<image>", "<|im_end|>", "<|eot|>", "<|start|>", "<|end|>", "</s>"))
    chat_template = ChatTemplate(tokenizer, image_token="<image>")
    assert chat_template.end_of_turn == end
    layout = chat_template.layout(CONVERSATION)
    answers = [i for i, piece in enumerate(layout) if isinstance(piece, Slot) and piece.tail]
    assert [layout[i].turn for i in answers] == [1, 3]
    assert all(layout[i + 1][: layout[i].tail].strip() == end for i in answers)


def test_template_without_an_end_of_turn_is_rejected(make_tokenizer):
    with pytest.raises(ValueError, match="eos_token"):
        ChatTemplate(make_tokenizer(LLAVA, specials=("<image>",), eos_token=None), image_token="<image>")


def test_template_that_drops_a_turn_is_rejected(make_tokenizer):
    template = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}</s>{% endfor %}"
    chat_template = ChatTemplate(make_tokenizer(template), image_token="<image>")
    with pytest.raises(ValueError, match="system, user, assistant"):
        chat_template.layout((("system", "t"), ("user", "t"), ("assistant", "t")))


def test_template_that_moves_scans_to_another_turn_is_rejected(make_tokenizer):
    template = (
        "{% for message in messages %}{% for item in message['content'] if item['type'] == 'image' %}<image>"
        "{% endfor %}{% endfor %}"
        "{% for message in messages %}{% for item in message['content'] if item['type'] == 'text' %}"
        "{{ item['text'] }}{% endfor %}</s>{% endfor %}"
    )
    chat_template = ChatTemplate(make_tokenizer(template), image_token="<image>")
    with pytest.raises(ValueError, match="moves a part"):
        chat_template.layout((("user", "st"), ("assistant", "t"), ("user", "st"), ("assistant", "t")))


def test_end_of_turn_is_the_longest_special_token_that_matches(make_tokenizer):
    template = "{% for message in messages %}{{ message['content'] }}<end><2>{% endfor %}"
    tokenizer = make_tokenizer(template, specials=("<image>", "<end>", "<end><2>"))
    assert ChatTemplate(tokenizer, image_token="<image>").end_of_turn == "<end><2>"


def test_template_that_drops_all_content_is_rejected(make_tokenizer):
    with pytest.raises(ValueError, match="content"):
        ChatTemplate(make_tokenizer("{% for message in messages %}hello</s>{% endfor %}"), image_token="<image>")


def test_layout_of_one_shape_is_rendered_once(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer()
    template = ChatTemplate(tokenizer, image_token="<image>")
    first = template.layout(CONVERSATION)
    monkeypatch.setattr(tokenizer, "apply_chat_template", None)
    assert template.layout(CONVERSATION) is first


def test_unknown_chatml_markup_is_warned_of_once(make_tokenizer, caplog):
    tokenizer = make_tokenizer(None, specials=("<image>", "<|im_start|>", "</s>"))
    for _ in range(2):
        template = ChatTemplate(tokenizer, image_token="<image>")
    assert template.end_of_turn == "<|im_end|>"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "<|im_end|>" in caplog.text
    assert "<|im_start|>" not in caplog.text


def test_another_image_token_in_the_template_is_warned_of(make_tokenizer, caplog):
    ChatTemplate(make_tokenizer(LLAVA, specials=("<image>", "<|scan|>", "</s>")), image_token="<|scan|>")
    assert "'<|scan|>'" in caplog.text


@pytest.mark.parametrize("template", [None, LLAVA, QWEN_VL, LLAMA], ids=["ChatML", "LLaVA", "QwenVL", "Llama"])
def test_matching_template_is_not_warned_of(make_tokenizer, caplog, template):
    ChatTemplate(make_tokenizer(template), image_token="<image>")
    assert not caplog.records
