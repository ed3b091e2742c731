"""Descriptions of table columns in JSON files such as `participants.json`: units, levels, codes for missing values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umbrella_data.bids.participants_table import MISSING_CELLS
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.manifest.row_json import to_object
from umbrella_data.scan.sidecar import read_json_object

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_MISSING_KEYS = (
    "missing", "missingvalue", "missingvalues", "missingcode", "missingcodes", "missingvaluecode", "missingvaluecodes",
    "navalue", "navalues", "nodatavalue", "nodatavalues",
)  # fmt: skip
_WORD_KEYS = ("description", "longname", "label", "name")
# Codes besides numbers: "NA", "not-done", "*"; no range or condition such as "1-5" or "< 0".
_CODE = re.compile(r"[^\W\d][\w./'-]*|[^\w\s<>=≤≥]+")
# Words of a level that is no value, also in "missing data", "answer refused", "not available / unknown".
_MISSING_WORDS = re.compile(
    r"""(?:(?:data|values?|answers?|information|participant|subject|patient)\s+)?
    (?:missing|unknown|na|nan|null|refused|refusal|skipped|invalid|declined|undisclosed|unspecified|unavailable
    |none\ given
    |do(?:es)?\ ?n[o']?t\ know|did\ not\ (?:answer|respond|know)
    |no\ (?:answer|data|response|value|information)(?:\ (?:available|given))?
    |not\ (?:done|available|applicable|reported|recorded|collected|known|given|provided|specified|answered|measured
    |assessed)
    |(?:refused|prefers?|declined)\ (?:not\ )?to\ (?:answer|say))
    (?:\s+(?:data|values?|answers?|information|response))?""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class ColumnDescription:
    """What a JSON file says about one column.

    Attributes:
        units: The unit; None if there is none.
        text: `LongName` and `Description`.
        levels: The word of each code; the code itself if it has no word. Empty without `Levels`.
        missing: Declared codes for missing values.
        minimum: Least valid number.
        maximum: Largest valid number.
    """

    units: str | None = None
    text: str = ""
    levels: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    minimum: float = -math.inf
    maximum: float = math.inf


def read_descriptions(path: Path) -> dict[str, object]:
    """The entries of a JSON file by column, to be parsed with `parse_description`; also by its name in lower case.

    Raises:
        ManifestError: If the file cannot be read, is larger than 4 MiB, is no JSON object or has a key twice.
    """
    try:
        entries = read_json_object(path, to_object=to_object)
    except ScanError as error:
        raise ManifestError(error.message, path=path) from error
    except ValueError as error:
        problem = str(error).removeprefix(f"{path} ")
        raise ManifestError(f"{problem}; write a JSON object with an entry for each column", path=path) from error
    entries = {column.strip(): entry for column, entry in entries.items()}
    return {column.lower(): entry for column, entry in entries.items()} | entries


def parse_description(entry: object, *, where: str, problems: list[str]) -> ColumnDescription:
    """Parse the entry of a column; what is wrong with it is added to `problems`, each starting with `where`."""
    if not isinstance(entry, dict):
        problems.append(f'{where} is not an object; write it as {{"Description": "..."}}')
        return ColumnDescription()
    keys = {re.sub("[^a-z]", "", str(key).lower()): value for key, value in entry.items()}
    own_problems: list[str] = []
    words = [_text(keys.get(key), key, own_problems) for key in ("longname", "description")]
    units = _text(keys.get("units"), "Units", own_problems)
    levels, missing = _split_levels(_levels(keys.get("levels"), own_problems))
    for key in _MISSING_KEYS:
        missing += _missing_codes(keys.get(key), key, own_problems)
    description = ColumnDescription(
        units=None if units.lower() in (*MISSING_CELLS, "none") else units,
        text=". ".join(filter(None, words)),
        levels=levels,
        missing=tuple(missing),
        minimum=_limit(keys.get("minimum"), "Minimum", own_problems, default=-math.inf),
        maximum=_limit(keys.get("maximum"), "Maximum", own_problems, default=math.inf),
    )
    problems += [f"{where}: {problem}" for problem in own_problems]
    return description


def parse_number(text: str) -> float | None:
    """The number that a text is; None for any other text, an infinite number, or a decimal comma."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def is_same(first: str, second: str) -> bool:
    """Whether two codes are the same, as numbers if they are numbers (tables have 1.0 for 1), without case if not."""
    one, other = parse_number(first), parse_number(second)
    if one is None or other is None:
        return first.casefold() == second.casefold()
    return one == other


def _text(value: object, key: str, problems: list[str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        problems.append(f"{key} is not a text")
        return ""
    if any("\ud800" <= character <= "\udfff" for character in value):
        problems.append(f"{key} is not Unicode text")
        return ""
    return " ".join(value.split())


def _levels(value: object, problems: list[str]) -> dict[str, str]:
    """The words by code, from `{"1": "male"}`, `{"1": {"Description": "male"}}` or `["M", "F"]`."""
    if isinstance(value, dict):
        codes = {_text(code, "a code of Levels", problems): word for code, word in value.items()}
        return _by_code({code: _word(word, code, problems) or code for code, word in codes.items()}, problems)
    if not isinstance(value, list | None):
        problems.append("Levels is not an object or a list")
        return {}
    return {code: code for code in _codes(value, "Levels", problems)}


def _word(value: object, code: str, problems: list[str]) -> str:
    if isinstance(value, dict):
        words = {str(key).lower(): word for key, word in value.items() if str(key).lower() != "termurl"}
        keys = _WORD_KEYS if len(words) != 1 else (*words,)  # a single one may be a language: {"en": "male"}
        found = next(filter(None, (_text(words.get(key), f"Levels: {key} of {code!r}", problems) for key in keys)), "")
        if words and not found and not set(words) & set(keys):
            problems.append(f'Levels: {code!r} has no Description; write its word as {code!r}: "..."')
        return found
    return str(value) if isinstance(value, int | float) else _text(value, f"Levels: {code!r}", problems)


def _by_code(levels: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Levels with the words as keys, `{"male": 1}`, turned around."""
    turned: dict[str, str] = {}
    for code, word in levels.items():
        is_reversed = parse_number(code) is None and parse_number(word) is not None
        key, value = (word, code) if is_reversed else (code, word)
        if turned.setdefault(key, value) != value:
            problems.append(f"Levels: {key!r} is the code of {turned[key]!r} and {value!r}; give each its own code")
    return turned


def _split_levels(levels: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The levels that are values, and the codes and words of those that are missing values."""
    missing = {code: word for code, word in levels.items() if _means_missing(word)}
    return {code: word for code, word in levels.items() if code not in missing}, [*missing, *missing.values()]


def _means_missing(word: str) -> bool:
    # "n/a" is one word, the slash of "unknown/refused" is between two; "missing value (-1)" repeats its code.
    text = re.sub(r"\bn[/.]\ ?a\b\.?", "na", word.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    text = re.sub(r"^missing:.+", "missing", text)
    split = re.split(r"[\s.]*(?:[/,;()]|\s+or\s+|\s-\s)[\s.]*", text.strip(" ."))
    parts = [part for part in split if part and parse_number(part) is None]
    return bool(parts) and all(_MISSING_WORDS.fullmatch(part) for part in parts)


def _codes(value: object, key: str, problems: list[str]) -> list[str]:
    """One code, several, or the keys of an object, as texts."""
    values: Sequence[object] = list(value) if isinstance(value, list | dict) else [value]
    if any(isinstance(code, bool) or not isinstance(code, str | int | float | None) for code in values):
        problems.append(f"{key} is not a list of texts and numbers")
        return []
    return [_text(str(code), key, problems) for code in values if code is not None]


def _missing_codes(value: object, key: str, problems: list[str]) -> list[str]:
    """Codes as of `_codes`; a text may list several: `-1, 88`."""
    codes: list[str] = []
    for part in (part.strip() for text in _codes(value, key, problems) for part in re.split("[,;]", text)):
        words = part.split()
        if all(parse_number(word) is not None for word in words):
            codes += words
        elif part.lower() in MISSING_CELLS or _CODE.fullmatch(part) or _means_missing(part):
            codes.append(part)
        else:
            problems.append(f"{key} has {part!r}, which is not a code; list the codes, such as [-1, 88], or give the "
                            "valid range as Minimum and Maximum")  # fmt: skip
    return codes


def _limit(value: object, key: str, problems: list[str], *, default: float) -> float:
    if value is None:
        return default
    number = None if isinstance(value, bool) else parse_number(str(value))
    if number is None:
        problems.append(f"{key} is not a number")
        return default
    return number
