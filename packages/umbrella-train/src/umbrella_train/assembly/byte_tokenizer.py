"""A byte-level tokenizer without files: 256 bytes and a few special tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from umbrella_model.tokens import IMAGE_TOKEN
from umbrella_train.assembly.load_errors import TOKENIZER, loading

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|pad|>"


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and the special tokens of ChatML; the vocabulary is always the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(
    name_or_path: str | None, *, key: str = "tokenizer", right: str = TOKENIZER
) -> PreTrainedTokenizerBase:
    """A pretrained tokenizer, from a folder or the hub; the byte-level one if no name is given.

    Raises:
        RunError: It does not exist or cannot be read; with `key` and `right` as in `loading`.
    """
    if name_or_path is None:
        return build_byte_tokenizer()
    # transformers raises KeyError and others on damaged files.
    with loading("tokenizer", key=key, source=name_or_path, right=right, errors=(Exception,)):
        path = Path(name_or_path)
        gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent if gguf else name_or_path, trust_remote_code=False, **gguf
        )
    return tokenizer
