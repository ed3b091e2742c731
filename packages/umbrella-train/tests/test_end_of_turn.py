"""Answers end where the chat template ends the assistant's turns."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from umbrella_model.tokens import image_token_id
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.end_of_turn import find_end_of_turn

GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None, *, specials: list[str]) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *specials]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "specials", "written", "is_one_token"),
    [
        (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", True),
        (None, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", True),
        (None, [], "<|im_end|>", False),
    ],
    ids=["Gemma", "ChatML", "ChatML of several tokens"],
)
def test_an_answer_ends_at_the_templates_end_of_turn(
    template: str | None, specials: list[str], written: str, is_one_token: bool
) -> None:
    tokenizer = make_tokenizer(template, specials=specials)
    end = find_end_of_turn(tokenizer, image_token_id=tokenizer.get_vocab()["<image>"])
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} <= set(end.stop_ids)
    assert (tokenizer.convert_tokens_to_ids(written) in end.stop_ids) is is_one_token
    generated = tokenizer(f"yes{written}\nno")["input_ids"]
    assert end.decode(generated, tokenizer) == "yes"


def test_the_tokenizer_of_the_demo_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_byte_tokenizer()
    find_end_of_turn(tokenizer, image_token_id=image_token_id(tokenizer))
    assert not caplog.records
