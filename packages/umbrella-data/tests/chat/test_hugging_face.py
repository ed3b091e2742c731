"""The chat encoder with Hugging Face tokenizers, which are trained here; needs transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.manifest.sample import Scan, Turn

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIALS = ["<image>", "<pad>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["user assistant system What is it? a brain, the left one. USER: ASSISTANT: yes no 37 years old\n\n"] * 40
# As in HuggingFaceTB/SmolVLM: the `generation` tag and trimming are features of transformers' own renderer.
ITEMS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% for item in message.content %}{% if item.type == 'image' %}<image>{% else %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ item.text | trim }}{% endgeneration %}"
    "{% else %}{{ item.text | trim }}{% endif %}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' USER: ' + m.content | trim }}"
    "{% elif m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
TURNS = (
    Turn("user", (Scan("T1", (Path("/a"),)), "What is it?")),
    Turn("assistant", ("a brain,  the left one.\n\nyes",)),
    Turn("user", ("Age?",)),
    Turn("assistant", ("37 years größer 脳",)),
)


def byte_level():
    """As GPT-2, Llama 3 and Qwen: offsets without leading blanks."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    return model


def metaspace():
    """As Llama 2: blanks are `▁`, the first word gets one, unknown characters are bytes."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIALS, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    # The trainer adds the bytes to the vocabulary only as special tokens, which they are not in Llama.
    state = json.loads(model.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=["byte-level", "metaspace"])
def make(request):
    model = request.param()

    def make_tokenizer(chat_template):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = chat_template
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        return tokenizer, ChatEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens={"T1": 4})

    return make_tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "<|im_end|>"), (ITEMS, "<|im_end|>"), (VICUNA, "</s>")],
    ids=["ChatML", "items", "Vicuna"],
)
def test_labels_decode_to_the_answers_and_ends_of_turn(make, template, end):
    tokenizer, encoder = make(template)
    encoded = encoder.encode(TURNS)
    found = tokenizer.decode(encoded.labels[encoded.labels != -100], clean_up_tokenization_spaces=False)
    wanted = f"a brain,  the left one.\n\nyes{end}37 years größer 脳{end}"
    if template == VICUNA:  # a blank before a word belongs to its token
        found = found.replace(f"{end} ", end).strip()
    assert found == wanted
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (encoded.input_ids == image).sum() == 4
    assert encoder.end_of_turn == end


@pytest.mark.parametrize("template", [None, ITEMS, VICUNA], ids=["ChatML", "items", "Vicuna"])
def test_prompt_is_a_prefix_of_the_conversation(make, template):
    _, encoder = make(template)
    whole, prompt = encoder.encode(TURNS), encoder.encode_prompt(TURNS)
    length = len(prompt.input_ids)
    assert (whole.input_ids[:length] == prompt.input_ids).all()
    assert (whole.labels[length:] != -100).any()
    assert (whole.labels[:length][-3:] == -100).all()


@pytest.mark.parametrize("template", [None, ITEMS, VICUNA], ids=["ChatML", "items", "Vicuna"])
def test_tokens_equal_those_of_apply_chat_template(make, template):
    tokenizer, encoder = make(template)
    texts = [turn.text for turn in TURNS]
    if template == ITEMS:
        contents = [[{"type": "text", "text": text}] for text in texts]
        contents[0] = [{"type": "image"}, *contents[0]]
    else:
        contents = [f"<image>\n{texts[0]}", *texts[1:]]
    messages = [{"role": turn.role, "content": content} for turn, content in zip(TURNS, contents, strict=True)]
    if template is None:
        from umbrella_data.chat.encoder import CHATML_TEMPLATE

        tokenizer.chat_template = CHATML_TEMPLATE
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    expected = [
        token
        for token_id in tokenizer(rendered, add_special_tokens=False)["input_ids"]
        for token in [token_id] * (4 if token_id == image else 1)
    ]
    assert encoder.encode(TURNS).input_ids.tolist() == expected


def test_unknown_characters_are_not_markup(make):
    tokenizer, encoder = make(None)
    encoded = encoder.encode((Turn("user", ("☃ Жш",)), Turn("assistant", ("☃",))))
    assert tokenizer.decode(encoded.labels[encoded.labels != -100]).endswith("<|im_end|>")


def test_unknown_words_are_not_markup():
    words = tokenizers.models.WordLevel({"yes": 0, "user": 1, "assistant": 2, "<unk>": 3}, unk_token="<unk>")
    model = tokenizers.Tokenizer(words)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    encoder = ChatEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), num_image_tokens={})
    encoded = encoder.encode((Turn("user", ("new word",)), Turn("assistant", ("strange yes",))))
    assert tokenizer.decode(encoded.labels[encoded.labels != -100]) == "<unk> yes <|im_end|>"


@pytest.mark.parametrize("text", ["a <image> b", "<|im_end|>", "x</s>"])
def test_texts_with_markup_are_rejected(make, text):
    _, encoder = make(None)
    with pytest.raises(ValueError, match="special token"):
        encoder.encode((Turn("user", ("What?",)), Turn("assistant", (text,))))
