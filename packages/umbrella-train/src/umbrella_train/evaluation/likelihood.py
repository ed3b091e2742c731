"""Log-likelihoods of possible answers to prompts, all answers of a prompt after one pass over it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from umbrella_model.hf_compat import CACHE

Tokens = tuple[int, ...]


@torch.no_grad()
def score_candidates(
    model: Any, batch: Mapping[str, Any], candidates: Sequence[Sequence[Tokens]], *, max_rows: int
) -> list[list[float]]:
    """The log-likelihood of every candidate after its prompt, in nats: the sum over its tokens.

    The language model computes every position of the prompts once, and of a candidate all tokens but the last.

    Args:
        model: An `UmbrellaForConditionalGeneration` in evaluation mode.
        batch: B prompts, padded on the left, as from `PaddingCollator`, on the model's device.
        candidates: For each prompt its candidates, each with at least one token.
        max_rows: Candidates that are computed together.

    Returns:
        For each prompt the log-likelihoods of its candidates.
    """
    mask = batch["attention_mask"]
    # As in training, positions count from the first token; Hugging Face's forward would count the padding, too.
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = model(**inputs, position_ids=position_ids, use_cache=True, logits_to_keep=1)
    cache = getattr(output, CACHE)
    first = _log_softmax(output.logits[:, -1])
    # All first tokens at once: each read of a GPU waits for it.
    pairs = [(row, tokens[0]) for row, choices in enumerate(candidates) for tokens in choices]
    values = iter(first[tuple(torch.tensor(pairs, device=first.device).reshape(-1, 2).T)].tolist())
    scores = [[next(values) for _ in choices] for choices in candidates]
    # Candidates of one length need no padding.
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, choices in enumerate(candidates):
        for number, tokens in enumerate(choices):
            by_length[len(tokens)].append((row, number))
    for length, members in sorted(by_length.items()):
        for start in range(0, len(members), max_rows) if length > 1 else ():
            chunk = members[start : start + max_rows]
            chosen = torch.tensor([candidates[row][number] for row, number in chunk], device=mask.device)
            rows = torch.tensor([row for row, _ in chunk], device=mask.device)
            found = _score_rest(model, chosen, rows=rows, cache=cache, mask=mask)
            for (row, number), value in zip(chunk, found.tolist(), strict=True):
                scores[row][number] += value
    return scores


def _score_rest(model: Any, tokens: Tensor, *, rows: Tensor, cache: Any, mask: Tensor) -> Tensor:
    """Log-likelihoods (R,) of tokens (R, n) after their first ones; `rows` (R,) are the numbers of their prompts."""
    known, wanted = tokens[:, :-1], tokens[:, 1:]
    selected = _select(cache, rows)
    prompt_mask = mask.index_select(0, rows)
    whole_mask = torch.cat([prompt_mask, torch.ones_like(known)], dim=1)
    start, num_known = prompt_mask.shape[1], known.shape[1]
    position_ids = prompt_mask.sum(dim=1, keepdim=True) + torch.arange(num_known, device=mask.device)
    # Some recurrent layers (Jamba) start from a zero state if they get several tokens at once.
    width = 1 if any(hasattr(layer, "recurrent_states") for layer in selected.layers) else num_known
    logits = []
    for begin in range(0, num_known, width):
        end = begin + width
        output = model(
            input_ids=known[:, begin:end],
            attention_mask=whole_mask[:, : start + end],
            position_ids=position_ids[:, begin:end],
            use_cache=True,
            **{CACHE: selected},
        )
        logits.append(output.logits)
    return _log_softmax(torch.cat(logits, dim=1)).gather(2, wanted.unsqueeze(2)).squeeze(2).sum(dim=1)


def _select(cache: Any, rows: Tensor) -> Any:
    """A cache with these rows of another one, which stays as it is."""
    selected = copy.copy(cache)
    # Each layer replaces its tensors by selected ones, so that copies of the objects are enough.
    selected.layers = [_copy_layer(layer) for layer in cache.layers]
    # Not `batch_select_indices`, which recurrent layers do not have; it selects only attention in mixed ones.
    selected.reorder_cache(rows)
    return selected


def _copy_layer(layer: Any) -> Any:
    """A cache layer with the same tensors, in dicts of its own: recurrent layers keep their states in dicts."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(copied, name, dict(value))
    return copied


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, or in float64 if the model computes in it."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
