"""The label that a cell of a table stands for, or the reason why it is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain

from umbrella_data.bids.age_unit import AGE_LIMITS, PER_YEAR, age_unit, known_unit
from umbrella_data.bids.column_descriptions import ColumnDescription, is_same, parse_number
from umbrella_data.bids.participants_table import MISSING_CELLS
from umbrella_data.manifest.answers import normalise

Label = str | float

# Usual codes for a missing value. 88, 99 and -1 are often real values: only a declaration makes them codes.
MISSING_CODES = (-9, -99, -999, -9999, 999, 9999)
_NEGATION = re.compile(r"\b(?:not|non|no|never|without|neither|isn)\b|=\s*(?:0|false)\b", re.IGNORECASE)
_SEXES = {
    **dict.fromkeys(("m", "male", "males", "man", "men", "boy", "boys"), "male"),
    **dict.fromkeys(("f", "female", "females", "woman", "women", "girl", "girls"), "female"),
}


class Kind(StrEnum):
    """How the cells of a column are read."""

    AGE = "age"
    SEX = "sex"
    CHOICE = "choice"
    NUMBER = "number"


@dataclass(frozen=True)
class LeftOut:
    """Why a cell has no label: the start of a message that lists all cells with this reason."""

    reason: str


@dataclass(frozen=True)
class ColumnReader:
    """Reads the cells of one column.

    Attributes:
        column: Its name.
        kind: How its cells are read. `AGE` gives years.
        description: What its JSON file says.
        missing: Further codes for missing values.
        given_unit: The unit to ask in, which the description may leave out.
        low: Least of the column's numbers that are no code for a missing value; `inf` if there is none.
        high: The largest of them; `-inf` if there is none.
    """

    column: str
    kind: Kind
    description: ColumnDescription
    missing: tuple[str, ...] = ()
    given_unit: str | None = None
    low: float = math.inf
    high: float = -math.inf

    @property
    def declared_unit(self) -> str | None:
        """The unit that its JSON file declares."""
        return age_unit(self.description.units, self.description.text) if self._is_age else self.description.units

    @property
    def unit(self) -> str | None:
        """The unit of the cells of a number or an age; an age without any is in years, as BIDS recommends."""
        unit = self.declared_unit or self.given_unit
        if not self._is_age:
            return unit
        return "years" if unit is None else known_unit(unit) or unit

    def over(self, cells: Iterable[str]) -> ColumnReader:
        """The reader that compares codes for missing values with the other cells of the column."""
        given = [cell for cell in cells if not self.is_missing(cell) and not self._is_declared_missing(cell)]
        parsed = map(parse_number, given)
        numbers = [number for number in parsed if number is not None and number not in MISSING_CODES]
        valid = [number for number in numbers if self._limit_broken(number) is None]
        declared = self.description.minimum, self.description.maximum
        low, high = min(valid, default=math.inf), max(valid, default=-math.inf)
        if all(map(math.isfinite, declared)):
            low, high = declared
        return replace(self, low=low, high=high)

    def is_missing(self, cell: str) -> bool:
        """Whether a cell is empty, `n/a` or the like, and not declared as a level, such as `-` for negative."""
        return cell.lower() in MISSING_CELLS and cell not in self.description.levels

    def read(self, cell: str) -> Label | LeftOut:
        """The label of a cell that is not missing: a number, or a text for a choice or a sex."""
        if self._is_declared_missing(cell):
            return LeftOut(f"values of {self.column} declared as missing, left out")
        if self.kind == Kind.SEX:
            return self._sex(cell)
        return self._choice(cell) if self.kind == Kind.CHOICE else self._number(cell)

    def _sex(self, cell: str) -> Label | LeftOut:
        level = _find_level(self.description.levels, cell)
        if level is not None:
            # Some files have the words as keys: {"male": "1"}, {"male": "H"}.
            texts: Sequence[str] = (level[1],) if is_same(cell, level[0]) else (level[1], level[0])
        else:
            texts = (cell,)
        is_negated = any(map(_NEGATION.search, texts))  # "not male"
        sex = None if is_negated else next(filter(None, map(_sex_of, texts)), None)
        if sex is None and level is None and parse_number(cell) is not None:
            return LeftOut(
                f"numbers of {self.column} without Levels, left out: declare their words in participants.json"
            )
        return sex or LeftOut(f"invalid values of {self.column}, left out")

    def _choice(self, cell: str) -> Label | LeftOut:
        if self.description.levels:
            level = _find_level(self.description.levels, cell)
            return level[1] if level else LeftOut(f"values of {self.column} that are none of its Levels, left out")
        number = parse_number(cell)
        if number is not None and self._is_code(number):
            return self._undeclared
        return cell

    def _number(self, cell: str) -> Label | LeftOut:
        number = parse_number(cell)
        if number is None:
            has_comma = re.fullmatch(r"[+-]?[\d.]*,[\d.,]*\d", cell)
            return LeftOut(f"numbers of {self.column} with a comma, left out: write a decimal point" if has_comma
                           else f"invalid values of {self.column}, left out")  # fmt: skip
        if self._is_code(number):
            return self._undeclared
        level = _find_level(self.description.levels, cell)
        if level is not None and not is_same(*level):
            return LeftOut(f"levels of {self.column} are words, left out: ask with --choice {self.column}")
        if limit := self._limit_broken(number):
            return LeftOut(f"values of {self.column} outside {limit}, left out")
        return self._in_years(number) if self.kind == Kind.AGE else number

    def _in_years(self, age: float) -> Label | LeftOut:
        per_year = PER_YEAR.get(self.unit or "")
        if per_year is None:
            return LeftOut(f"values of {self.column} in {self.unit!r}, which is not converted to years, left out: "
                           f"correct its unit, or ask in this unit (--number {self.column})")  # fmt: skip
        return age if per_year == 1 else round(age / per_year, 2)

    @property
    def _is_age(self) -> bool:
        return self.kind == Kind.AGE or (self.kind == Kind.NUMBER and self.column.lower() == "age")

    @property
    def _undeclared(self) -> LeftOut:
        kept_by = "Levels" if self.kind == Kind.CHOICE else "Minimum and Maximum"
        return LeftOut(
            f"values of {self.column} such as -999 outside the range of its other values, left out as missing "
            f"({kept_by} in participants.json keep them)"
        )

    def _is_declared_missing(self, cell: str) -> bool:
        return any(is_same(cell, code) for code in (*self.description.missing, *self.missing))

    def _is_code(self, number: float) -> bool:
        return number in MISSING_CODES and not self.low <= number <= self.high

    def _limit_broken(self, number: float) -> str | None:
        """The limit that a number of the column is outside of, if any."""
        minimum, maximum = self.description.minimum, self.description.maximum
        if not minimum <= number <= maximum:
            return f"its declared range, {minimum:g} to {maximum:g}"
        per_year = PER_YEAR.get(self.unit or "") if self._is_age else None
        if per_year is not None and not AGE_LIMITS[0] <= number / per_year <= AGE_LIMITS[1]:
            return f"{AGE_LIMITS[0]} to {AGE_LIMITS[1]} years"
        return None


def option_key(label: Label) -> str | float:
    """What is the same for spellings of one option that scoring does not tell apart: `AD.` and `ad`, `1` and `1.0`."""
    text = normalise(str(label))
    number = parse_number(text)
    return text if number is None else number


def _find_level(levels: Mapping[str, str], cell: str) -> tuple[str, str] | None:
    """The code and word of a cell, which is the code, the code as another spelling of its number, or the word."""
    if cell in levels:
        return cell, levels[cell]
    by_code = ((code, word) for code, word in levels.items() if is_same(code, cell))
    by_word = ((code, word) for code, word in levels.items() if is_same(word, cell))
    return next(chain(by_code, by_word), None)


def _sex_of(text: str) -> str | None:
    """`male` or `female` if exactly one of them is among the words: "female" is not "male"."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    found = {_SEXES[word] for word in words if word in _SEXES and (len(word) > 1 or len(words) == 1)}
    return found.pop() if len(found) == 1 else None
