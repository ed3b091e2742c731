"""A `ChatEncoder` from the name of a tokenizer, to check manifests without a model."""

from __future__ import annotations

from typing import cast

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.modality import MODALITIES

# Names of the image token, by decreasing preference; the first is added to a tokenizer without any.
_IMAGE_TOKENS = ("<|image|>", "<image>", "<|image_pad|>", "<image_soft_token>", "[IMG]")


def load_encoder(name: str) -> ChatEncoder:
    """Load a Hugging Face tokenizer; each scan takes one position.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer cannot be loaded or used.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("--tokenizer needs transformers; install it with: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged files raise errors of any class
        raise ValueError(f"{name}: the tokenizer cannot be loaded: {error}") from error
    token = next((token for token in _IMAGE_TOKENS if token in tokenizer.get_vocab()), None)
    if token is None:
        token = _IMAGE_TOKENS[0]
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    try:
        return ChatEncoder(
            tokenizer,
            image_token_id=cast(int, tokenizer.convert_tokens_to_ids(token)),
            num_image_tokens=dict.fromkeys(MODALITIES, 1),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
