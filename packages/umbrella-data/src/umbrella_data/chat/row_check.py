"""Whether the rows of a manifest can be encoded with a tokenizer, and are asked as they are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from umbrella_data.chat.candidates import encode_candidates
from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.chat.number_targets import NumberTargets
from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Turn
from umbrella_data.modality import MODALITIES

# Rows of each kind of answer whose prompts are compared; the others have the same layout.
_PER_KIND = 3
# Names of the image token, by decreasing preference; the first is added to a tokenizer without any.
_IMAGE_TOKENS = ("<|image|>", "<image>", "<|image_pad|>", "<image_soft_token>", "[IMG]")


def encoding_problems(
    manifest: Manifest,
    encoder: ChatEncoder,
    *,
    max_length: int | None = None,
    rows: Iterable[int] | None = None,
    numbers: NumberTargets | None = None,
) -> Iterator[tuple[int, str]]:
    """The line of each row that cannot be encoded, and why; no scan is opened.

    The prompts of a few rows of each answer type are compared with the training text, see `prompt_problem`. Each option
    of a choice must be encodable after a prompt, also if it is no row's answer.

    Args:
        manifest: Rows that are invalid in themselves are passed over.
        encoder: Tokenizer and numbers of image tokens.
        max_length: Maximum number of positions of an example.
        rows: Numbers of the rows to check; None checks all.
        numbers: How numbers are written in the answers; None as in the rows.
    """
    numbers = numbers or NumberTargets()
    num_compared: Counter[tuple[str, ...]] = Counter()
    known_options: set[str] = set()
    for row in range(len(manifest)) if rows is None else rows:
        try:
            sample = manifest[row]
        except ManifestError:
            continue
        where = f"line {manifest.line(row)}, subject {sample.subject}"
        try:
            messages, problem = numbers.write(sample), numbers.problem(sample)
            encoder.encode(messages, max_length=max_length)
            kind = (sample.answer.type if sample.answer else "", *(turn.role for turn in messages))
            num_compared[kind] += 1
            if problem is None and num_compared[kind] <= _PER_KIND:
                problem = prompt_problem(encoder, messages, max_length=max_length)
            options = set(sample.answer.options if sample.answer else ()) - known_options
            if problem is None and options:
                encode_candidates(encoder, messages, sorted(options), max_length=max_length)
                known_options |= options
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            yield manifest.line(row), f"{where}: {problem}"


def prompt_problem(encoder: ChatEncoder, turns: Sequence[Turn], *, max_length: int | None = None) -> str | None:
    """What differs between the prompts of a conversation's answers and its training text; None if nothing does.

    Every answer that is learned is asked for with the first tokens of the training text, and its first label follows
    them.

    Raises:
        ValueError: As `ChatEncoder.encode`.
    """
    trained = encoder.encode(turns, max_length=max_length)
    ids, is_learned = trained.input_ids.tolist(), (trained.labels != -100).tolist()
    starts = {place for place, learned in enumerate(is_learned) if learned and not (place and is_learned[place - 1])}
    first = 1 if turns[0].role == "system" else 0
    kept = [*turns[:first], *turns[first + trained.num_dropped_turns :]]
    earlier = [number for number, turn in enumerate(kept[:-1]) if turn.role == "assistant"]
    prompts = [encoder.encode_prompt(kept[: number + 1]) for number in earlier]
    for asked in (*prompts, encoder.encode_prompt(turns, max_length=max_length)):
        prompt = asked.input_ids.tolist()
        if ids[: len(prompt)] == prompt:
            starts.discard(len(prompt))
    if not starts:
        return None
    return ("an answer is trained after other tokens than those that a prompt ends with, so that the model is never "
            "asked as it was trained; use another chat template (tokenizer.chat_template)")  # fmt: skip


def load_encoder(name: str) -> ChatEncoder:
    """Load a Hugging Face tokenizer to check manifests without a model; each scan takes one position.

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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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
