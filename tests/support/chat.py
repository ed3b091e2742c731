"""Chat templates after those of known model families, in a few lines each, and tokenizers of three kinds."""

from __future__ import annotations

import json
from typing import Any

SPECIALS = (
    "<image>", "<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
# A turn's content as text: as it is, or from a list of items.
_TEXT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
)
_FOR, _END = "{% for m in messages %}", "{% endfor %}"
_CHATML_TURN = "<|im_start|>{{ m.role }}\n" + _TEXT + "<|im_end|>\n"
_ASK = "{% if add_generation_prompt %}PROMPT{% endif %}"


def _asks(prompt: str) -> str:
    return _ASK.replace("PROMPT", prompt)


_QWEN3 = (
    _FOR + "{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n<think>\n\n</think>\n\n" + _TEXT
    + "<|im_end|>\n{% else %}" + _CHATML_TURN + "{% endif %}" + _END
)  # fmt: skip


def _by_role(user: str, assistant: str, system: str) -> str:
    """A template that writes each turn by its role; $ is the content."""
    turns = (
        "{% if m.role == 'assistant' %}" + assistant + "{% elif m.role == 'system' %}" + system + "{% else %}" + user
        + "{% endif %}"
    )  # fmt: skip
    return _FOR + turns.replace("$", _TEXT) + _END


_HARMONY_END = "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
TEMPLATES = {
    "ChatML": _FOR + _CHATML_TURN + _END + _asks("<|im_start|>assistant\n"),
    "Llama-2": "{{ bos_token }}" + _by_role("[INST] $ [/INST]", " $ </s>", "<<SYS>>\n$\n<</SYS>>\n\n"),
    "Llama-3": "{{ bos_token }}" + _FOR + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + _TEXT
    + "<|eot_id|>" + _END + _asks("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "Vicuna": _by_role("USER: $ ", "ASSISTANT: $</s>", "$\n\n") + _asks("ASSISTANT:"),
    "Mistral": "{{ bos_token }}" + _by_role("[INST]$[/INST]", "$</s>", "$\n\n"),
    "Gemma": "{{ bos_token }}" + _by_role(
        "<start_of_turn>user\n$<end_of_turn>\n", "<start_of_turn>model\n$<end_of_turn>\n",
        "<start_of_turn>user\n$<end_of_turn>\n",
    ) + _asks("<start_of_turn>model\n"),
    "Phi": _FOR + "<|{{ m.role }}|>\n" + _TEXT + "<|end|>\n" + _END + _asks("<|assistant|>\n"),
    # The prompt of the first opens no block, that of the second closes one, and that of the third leaves it open.
    "Qwen3": _QWEN3 + _asks("<|im_start|>assistant\n"),
    "Qwen3 without thinking": _QWEN3 + _asks("<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "opens a block": _FOR + _CHATML_TURN + _END + _asks("<|im_start|>assistant\n<think>\n"),
    "GLM": "[gMASK]" + _by_role("<|user|>\n$", "<|assistant|>\n<think></think>\n$", "<|system|>\n$")
    + _asks("<|assistant|>\n"),
    "harmony": "<|start|>system<|message|>Be brief.<|end|>" + _by_role(
        "<|start|>user<|message|>$<|end|>", "<|start|>assistant<|channel|>final<|message|>$" + _HARMONY_END,
        "<|start|>developer<|message|>$<|end|>",
    ) + _asks("<|start|>assistant"),
    "DeepSeek": "{{ bos_token }}" + _by_role("<|User|>$", "<|Assistant|></think>$</s>", "$")
    + _asks("<|Assistant|><think>"),
    "SmolLM": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
    "{% endif %}" + _FOR + _CHATML_TURN + _END + _asks("<|im_start|>assistant\n"),
    "Idefics": _by_role("User:$<end_of_turn>\n", "Assistant: $<end_of_turn>\n", "System: $\n") + _asks("Assistant:"),
}  # fmt: skip
KINDS = ("byte level", "metaspace", "digits split")

_CORPUS = [
    "user assistant system USER ASSISTANT What is the sex of this person How old is it a brain, the left one yes no "
    "female male 37 years 41 years 44 years\n\nBe brief. ANSWER: left"
] * 40


def build_tokenizer(kind: str, template: str | None) -> Any:
    """A Hugging Face tokenizer of one of `KINDS`, trained on a few words.

    `byte level` is as of GPT-2 (offsets without leading blanks), `metaspace` as of Llama 2, and `digits split` as of
    Qwen2: a digit shares no token with what is around it.
    """
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast

    pre, alphabet, specials = hf.pre_tokenizers, hf.pre_tokenizers.ByteLevel.alphabet(), list(SPECIALS)
    if kind == "metaspace":
        model = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        model.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        model.decoder = hf.decoders.Sequence(
            [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        )
        alphabet = []
        specials = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256))]
    else:
        model = hf.Tokenizer(hf.models.BPE())
        if kind == "digits split":
            pattern = hf.Regex(r"\p{N}| ?\p{L}+|\s+| ?[^\s\p{L}\p{N}]+")
            byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
            model.pre_tokenizer = pre.Sequence([pre.Split(pattern, "isolated"), byte_level])
        else:
            model.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
            model.post_processor = hf.processors.ByteLevel(trim_offsets=True)
        model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(_CORPUS, trainer)
    # The trainer has no other way to add the bytes to the vocabulary; in Llama 2 they are ordinary tokens.
    state = json.loads(model.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    model = hf.Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIALS if token not in ("<s>", "</s>", "<pad>", "<unk>")],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer
