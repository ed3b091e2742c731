"""A byte-level tokenizer without files: 256 bytes and a few special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from umbrella_train.assembly.load_errors import TOKENIZER, loading

IMAGE_TOKEN = "<|image|>"
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id of scan positions; `<|image|>` is added to a tokenizer without one."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(token_id, int)
    return token_id
