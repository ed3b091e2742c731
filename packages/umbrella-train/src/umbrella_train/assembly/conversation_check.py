"""Checks at a run's start that the tokenizer fits the model and can encode the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from umbrella_data import ConversationDataset
from umbrella_train.distributed.ranks import on_first_rank
from umbrella_train.errors import RunError

_MAX_NAMED = 20
# Of larger manifests, this many rows are checked.
_SOME_ROWS = 1_000


def check_conversations(datasets: Sequence[ConversationDataset], *, max_rows: int) -> None:
    """Encodes the rows of data sets as training and as evaluation do; no scan is opened. Called by every rank.

    Of a data set with more than `max_rows` valid rows, a thousand are checked.

    Raises:
        RunError: With manifest, line and subject of rows that cannot be encoded, or whose prompt differs from what is
            trained.
    """
    problems = on_first_rank(lambda: [problem for data in datasets for problem in _problems(data, max_rows)])
    if problems:
        raise RunError("\n".join(problems))


def _problems(dataset: ConversationDataset, max_rows: int) -> list[str]:
    num_rows = len(dataset)
    rows: Iterable[int] = range(0, num_rows, 1 if num_rows <= max_rows else -(-num_rows // _SOME_ROWS))
    found = [
        f"{dataset.manifest.path}, {problem}" for _, problem in islice(dataset.encoding_problems(rows), _MAX_NAMED)
    ]
    return [*found, "there may be more"] if len(found) == _MAX_NAMED else found


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int, image_token_id: int, source: str
) -> None:
    """Compares the ids of a tokenizer, loaded from `source`, with the rows of the model's embedding.

    Raises:
        RunError: An id of the tokenizer, or the model's image token, has no embedding; the image token is not an added
            token of the tokenizer; or the tokenizer has neither a padding nor an end-of-sequence token.
    """
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    problems = []
    if num_tokens > num_embeddings:
        problems.append(
            f"the tokenizer has {num_tokens} tokens, and the model embeds {num_embeddings}: use the model's own "
            "tokenizer, or resize the embedding of the checkpoint (resize_token_embeddings), or raise "
            "model.text_config.vocab_size"
        )
    if not 0 <= image_token_id < num_embeddings:
        problems.append(
            f"the model's image token has the id {image_token_id}, and the model embeds {num_embeddings} tokens: "
            "correct image_token_index in the config.json of the checkpoint"
        )
    elif image_token_id not in tokenizer.added_tokens_decoder:
        problems.append(
            f"the model's image token has the id {image_token_id}, which is not an added token of the tokenizer: use "
            "the model's own tokenizer"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        problems.append(
            "the tokenizer has neither a padding nor an end-of-sequence token: set pad_token in its "
            "tokenizer_config.json"
        )
    if problems:
        raise RunError("\n".join(f"{source}: {problem}" for problem in problems))
