"""A byte-level tokenizer made on the spot: 256 bytes and a handful of special tokens, nothing to download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from umbrella_train.assembly.load_errors import TOKENIZER, loading

IMAGE_TOKEN = "<|image|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|pad|>"


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, and the special tokens of ChatML; the same vocabulary every time."""
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
    """A pretrained tokenizer, or the byte-level one where none is named.

    Args:
        name_or_path: A folder, or a name on the hub.
        key: What names it, for the message of an error.
        right: What would be right, for that message.

    Raises:
        RunError: There is none, or it cannot be read.
    """
    if name_or_path is None:
        return build_byte_tokenizer()
    # Nothing of ours runs in there, and transformers lets KeyError and the like out over a damaged file.
    with loading("tokenizer", key=key, source=name_or_path, right=right, errors=(Exception,)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase, *, model_token_id: int | None = None) -> int:
    """The id that stands at scan positions; a tokenizer without one is given `<|image|>`.

    Args:
        tokenizer: May get one token more.
        model_token_id: The id that a pretrained model uses.
    """
    if model_token_id is not None:
        return model_token_id
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(token_id, int)
    return token_id
