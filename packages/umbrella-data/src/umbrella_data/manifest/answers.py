"""Reading an answer from text: the same for scoring a model and for checking the rows of a manifest."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

from umbrella_data.manifest.sample import REASONING_TAGS, Answer, Sample

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\.?\d|[^\W\d_])")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
# "minus 41", and "- 41" at the start: "Age - 41" is no negative number.
_SPACED_SIGN = re.compile(r"(?:^\s*-|\b(?:minus|negative))\s+(?=\d)", re.IGNORECASE)
# Words and signs next to a number that make it a bound, a denial or another number.
_BEFORE = re.compile(
    r"(?:(?<![-=\w/])[<>≤≥]=?|\b(?:not|than|over|under|above|below|at least|at most))\s*$", re.IGNORECASE
)
_AFTER = re.compile(r"\s*(?:hundred|thousand|million|billion)s?\b", re.IGNORECASE)
TIME_UNITS: dict[str, tuple[str, ...]] = {
    "years": ("years", "year", "yrs", "yr", "y"),
    "months": ("months", "month", "mths", "mth", "mos", "mo"),
    "weeks": ("weeks", "week", "wks", "wk", "w"),
    "days": ("days", "day", "d"),
    "hours": ("hours", "hour", "hrs", "hr", "h"),
    "minutes": ("minutes", "minute", "mins", "min"),
    "seconds": ("seconds", "second", "secs", "sec", "s"),
    "decades": ("decades", "decade"),
}
"""Names of each unit of time."""
_TIME_UNIT_OF = {name: unit for unit, names in TIME_UNITS.items() for name in names}
# Values below 1 lose their meaning if rounded further: 0.49 is not 0.
_MAX_ROUNDING = 0.05


def normalise(text: str) -> str:
    """Fold what does not change an answer: case, blanks, Unicode forms, quotes and full stops around it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"(?<![\w.])\.(?=\d)", "0.", folded)  # .5 is not 5
    return " ".join(folded.split()).strip(" .!?\"'`*,;:")


def without_reasoning(text: str) -> str:
    """The text after its block of reasoning, if it has one; empty if the block was cut off."""
    opening, closing = REASONING_TAGS
    return text.rpartition(closing)[2] if closing in text else text.partition(opening)[0]


def read_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The option that a text is after its reasoning; None if it is none of them."""
    said = normalise(without_reasoning(text))
    return next((option for option in options if normalise(option) == said), None)


def read_number(text: str, *, unit: str | None = None) -> float | None:
    """The one number in a text, after its reasoning.

    Args:
        text: Such as `41 years`; `minus 41` and other dashes are negative numbers.
        unit: The unit that was asked for.

    Returns:
        None if there is no number, or several, or an infinite one; if it is a bound (`> 41`), denied (`not 41`) or in
        words in part (`41 thousand`); if it has another unit of time than `unit`.
    """
    digits = _digits(text, unit)
    value = math.nan if digits is None else float(digits)
    return value if math.isfinite(value) else None


def count_decimals(text: str, *, unit: str | None = None) -> int:
    """The decimals of the one number in a text, see `read_number`; 0 without one."""
    exponent = Decimal(_digits(text, unit) or "0").as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def replace_number(text: str, value: float, *, decimals: int, unit: str | None = None) -> str:
    """A text with another number in place of its one number, which follows its reasoning.

    Args:
        text: Such as `41.23 years`.
        value: The number, rounded to `decimals`.
        decimals: Decimals of the number, also if they are 0: `41.20`.
        unit: As for `read_number`.

    Raises:
        ValueError: If `read_number` finds no number in the text.
    """
    words = without_reasoning(text)
    found = _find_number(words, unit)
    if found is None:
        raise ValueError(f"the text {text!r:.60} has no readable number")
    own = list(_NUMBER.finditer(words))
    if len(own) == 1 and own[0][0] == found[0]:
        found = own[0]  # in the words as they are: "mm³" stays
    thousands = "," if "," in found[0] else ""
    number = f"{round(value, decimals) + 0.0:{thousands}.{decimals}f}"  # + 0.0: there is no -0
    before, _, after = text.rpartition(words) if REASONING_TAGS[1] in text else text.partition(words)
    return f"{before}{found.string[: found.start()]}{number}{found.string[found.end() :]}{after}"


def _digits(text: str, unit: str | None) -> str | None:
    found = _find_number(without_reasoning(text), unit)
    return None if found is None else found[0].replace(",", "")


def _find_number(words: str, unit: str | None) -> re.Match[str] | None:
    """The one number in words without reasoning, as a match in their plain form: NFKC, with `-` for other dashes."""
    plain = _SPACED_SIGN.sub("-", _DASHES.sub("-", unicodedata.normalize("NFKC", words)))
    found = list(_NUMBER.finditer(plain))
    if len(found) != 1:
        return None
    before, after = plain[: found[0].start()], plain[found[0].end() :]
    asked, given = _time_unit(unit or ""), _time_unit(after)
    is_other_unit = asked is not None and given is not None and asked != given
    if is_other_unit or _BEFORE.search(before) or _AFTER.match(after):
        return None
    return found[0]


def _time_unit(text: str) -> str | None:
    word = re.match(r"[\s(-]*([a-z]+)", text.lower())
    return _TIME_UNIT_OF.get(word[1]) if word else None


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
        return normalise(without_reasoning(words)) == normalise(str(answer.value))
    number, value = read_number(words, unit=answer.unit), float(answer.value)
    if number is None:
        return False
    decimals = (_digits(words, answer.unit) or "").partition(".")[2]  # the words may be rounded
    is_rounded = abs(number - value) <= 0.5 * 10 ** -len(decimals) * (1 + 1e-6)
    is_near = abs(value) >= 1 or math.isclose(number, value, rel_tol=_MAX_ROUNDING)
    return math.isclose(number, value, rel_tol=1e-6) or (is_rounded and is_near)
