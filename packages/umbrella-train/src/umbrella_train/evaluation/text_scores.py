"""Scores of generated texts against the right ones; packages add theirs through the entry point group below.

To add a score of our own, add a row to `TEXT_SCORES`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from umbrella_data.manifest.answers import normalise, without_reasoning
from umbrella_train.errors import RunError
from umbrella_train.evaluation.laterality import Lexicon, packaged_lexicon, read_lexicon

TextScore = Callable[[str, str], float | None]
"""From the generated text and the right answer, a score from 0 to 1; None if it is undefined for them."""
TEXT_SCORES_GROUP = "umbrella_train.text_scores"


def exact_match(generated: str, answer: str) -> float:
    """1 where the text is the answer, but for case, blanks and punctuation around it; else 0."""
    return float(normalise(without_reasoning(generated)) == normalise(answer))


def token_f1(generated: str, answer: str) -> float:
    """F1 of the words, as in SQuAD (Rajpurkar 2016) but with articles: a word counts as often as both texts have it.

    Punctuation around words does not count. Of two texts without words the score is 1, of one 0.
    """
    given, right = Counter(_words(without_reasoning(generated))), Counter(_words(answer))
    if not given or not right:
        return float(given == right)
    return 2 * (given & right).total() / (given.total() + right.total())


def rouge_l(generated: str, answer: str) -> float | None:
    """ROUGE-L (Lin 2004), the F-measure of rouge-score without stemming; None if the answer has no ASCII word."""
    # rouge-score drops all other characters: answers in other scripts would score 0 whatever the model says.
    if not any(char.isascii() and char.isalnum() for char in answer):
        return None
    return float(_rouge_scorer().score(answer, without_reasoning(generated))["rougeL"].fmeasure)


def laterality_f1(generated: str, answer: str, *, lexicon: Lexicon | None = None) -> float | None:
    """F1 of the sides (left, right, bilateral) that the texts mention: 0 where left and right are confused.

    Args:
        generated: The generated text.
        answer: The right one.
        lexicon: Words of each side (default: the packaged English ones).

    Returns:
        None if neither text mentions a side.
    """
    words = lexicon or packaged_lexicon()
    given, right = words.sides(without_reasoning(generated)), words.sides(answer)
    return 2 * len(given & right) / (len(given) + len(right)) if given or right else None


TEXT_SCORES: Mapping[str, TextScore] = MappingProxyType(
    {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l, "laterality_f1": laterality_f1}
)


def text_scores(*, laterality_lexicon: Path | None = None) -> Mapping[str, TextScore]:
    """All scores by name: `TEXT_SCORES`, then those of installed packages in the order of their names.

    Args:
        laterality_lexicon: File with the words of `laterality_f1`, see `read_lexicon`.

    Raises:
        RunError: For an entry point that cannot be loaded, is no function, or has the name of another; for an invalid
            lexicon. A function of a package raises it if it fails or returns no number.
    """
    scores: dict[str, TextScore] = dict(TEXT_SCORES)
    if laterality_lexicon is not None:
        scores["laterality_f1"] = partial(laterality_f1, lexicon=read_lexicon(laterality_lexicon))
    problems = []
    for entry in sorted(entry_points(group=TEXT_SCORES_GROUP), key=lambda entry: entry.name):
        if entry.name in scores:
            problems.append(f"{_origin(entry)}: there is a score of this name already; choose another")
            continue
        try:
            scores[entry.name] = _load(entry)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))
    return MappingProxyType(scores)


def _load(entry: EntryPoint) -> TextScore:
    try:
        function: Any = entry.load()
    except Exception as error:  # code of another package
        raise RunError(f"{_origin(entry)}: cannot be loaded: {error!r}") from error
    if not callable(function):
        raise RunError(
            f"{_origin(entry)}: {entry.value} is a {type(function).__name__}; it must be a function of the generated "
            "text and the answer"
        )

    def score(generated: str, answer: str) -> float | None:
        try:
            value = function(without_reasoning(generated), answer)
            number = None if value is None else float(value)
        except Exception as error:  # code of another package
            raise RunError(f"{_origin(entry)}: failed: {error!r}") from error
        if number is not None and not math.isfinite(number):
            raise RunError(f"{_origin(entry)}: returned {number}; it must return a finite number or None")
        return number

    return score


def _origin(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"{package}, entry point {entry.name!r} of {TEXT_SCORES_GROUP}"


def _words(text: str) -> list[str]:
    words = (normalise(word) for word in normalise(text).split())
    return [word for word in words if word]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # late: takes seconds

    return RougeScorer(["rougeL"], use_stemmer=False)
