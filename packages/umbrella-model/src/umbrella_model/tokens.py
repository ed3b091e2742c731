"""The tokens that a language model's tokenizer lacks: the image token, and ChatML's markup without a chat template."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AddedToken, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image|>"
# Of common tokenizers: the rows of the embedding exist already.
KNOWN_IMAGE_TOKENS = (IMAGE_TOKEN, "<image>", "<|image_pad|>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds the image token if the tokenizer has none, and ChatML if it has no chat template; changed in place.

    Returns:
        The id of the image token.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
        missing = _add_missing(tokenizer, CHATML_TOKENS)
        advice = "; they are new tokens: train the embeddings too (model.learn.embeddings: train)" if missing else ""
        logger.warning("the tokenizer has no chat template: ChatML is used, with %s and %s%s", *CHATML_TOKENS, advice)
    return image_token_id(tokenizer)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's image token; `<|image|>` is added to a tokenizer without one."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    known = next((token for token in KNOWN_IMAGE_TOKENS if token in added), None)
    if known is None:
        _add_missing(tokenizer, [IMAGE_TOKEN])
    token_id = tokenizer.convert_tokens_to_ids(known or IMAGE_TOKEN)
    assert isinstance(token_id, int)
    return token_id


def _add_missing(tokenizer: PreTrainedTokenizerBase, tokens: Any) -> list[str]:
    """Adds special tokens that the tokenizer does not have; returns those without an id before.

    A word of the vocabulary keeps its id, and text with it becomes that one token.
    """
    words = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # `add_special_tokens` would replace the tokenizer's list of other special tokens.
    new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in added]
    tokenizer.add_tokens(new, special_tokens=True)
    return [token for token in tokens if token not in words]


@torch.no_grad()
def add_embeddings(language_model: Any, *, num_tokens: int) -> None:
    """Adds rows to the token embeddings and the head of a `...ForCausalLM`, if it has fewer than `num_tokens`.

    New rows are the mean of the others, so that new tokens are as likely as an average one (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"); ties are kept.
    """
    num_rows = language_model.get_input_embeddings().num_embeddings
    if num_tokens <= num_rows:
        return
    language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for parameter in module.parameters():
            parameter[num_rows:] = parameter[:num_rows].float().mean(dim=0).to(parameter.dtype)
    logger.info("token embeddings: %d rows added to %d", num_tokens - num_rows, num_rows)
