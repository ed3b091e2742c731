"""Reading an answer from text: the same for scoring a model and for checking the rows of a manifest."""

from __future__ import annotations

import math
import re
import unicodedata

from umbrella_data.manifest.sample import Answer, Sample

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\.?\d|[^\W\d_])")


def normalise(text: str) -> str:
    """Fold what does not change an answer: case, blanks, Unicode forms, quotes and full stops around it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .!?\"'`*,;:")


def read_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The option that a text is; None if it is none of them."""
    return next((option for option in options if normalise(option) == normalise(text)), None)


def read_number(text: str) -> float | None:
    """The one number in a text; None if there is no number, or several, or an infinite one."""
    found = _numbers(text)
    value = float(found[0]) if len(found) == 1 else math.nan
    return value if math.isfinite(value) else None


def _numbers(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    return [number.replace(",", "") for number in _NUMBER.findall(plain)]


def contradiction(sample: Sample) -> str | None:
    """What is wrong between the last answer in words and the scored value of a sample; None if they agree.

    A model learns the words and is scored on the value: where they differ, a right answer counts as wrong.
    """
    answer, words = sample.answer, sample.messages[-1].text
    if answer is None or _agrees(words, answer):
        return None
    if answer.type == "choice" and read_choice(words, answer.options) is None:
        return f"the assistant says {words!r:.60}, which is none of the options {', '.join(answer.options)}"
    return f"the assistant says {words!r:.60}, but the scored value is {answer.value!r:.60}"


def _agrees(words: str, answer: Answer) -> bool:
    if answer.type == "choice":
        return read_choice(words, answer.options) == answer.value
    if answer.type == "text":
        return normalise(words) == normalise(str(answer.value))
    number, value = read_number(words), float(answer.value)
    if number is None:
        return False
    digits = _numbers(words)[0].partition(".")[2]  # the words may be rounded
    return math.isclose(number, value, rel_tol=1e-6) or number == round(value, len(digits))
