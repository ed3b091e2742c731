"""The unit of a column of ages, from its description in a JSON file."""

from __future__ import annotations

import re

from umbrella_data.manifest.answers import TIME_UNITS

DAYS_PER_YEAR = 365.25
AGE_LIMITS = (0, 120)  # years

# How many of each unit are in a year.
PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": DAYS_PER_YEAR / 7, "days": DAYS_PER_YEAR}
_UNIT_OF = {name: unit for unit in PER_YEAR for name in TIME_UNITS[unit]} | {"yo": "years", "a": "years"}
_OTHER_WORDS = {"age", "at", "calendar", "completed", "decimal", "full", "in", "o", "of", "old", "scan", "the"}
# "age in months", "age (months)", "age (in decimal years)", "age [wks]", "age, days"
_PHRASE = re.compile(
    r"(?:\bin\s+|[(\[]\s*|[,:]\s*(?=\w+\W*$))(?:(?:calendar|completed|decimal|fractional|full|rounded|whole)\s+)?"
    r"(years?|yrs?|months?|mos?|mths?|weeks?|wks?|days?|hours?|hrs?|[ymwdh](?=\s*[)\]]))\b"
)
# Outside such phrases, "at the day of the scan" is no unit: plurals are. "6 months", as of a group, is not converted.
_ELSEWHERE = re.compile(
    r"(?:\b\d+\W*)?\b(?:months|mos|mths|weeks|wks|days|hours|hrs|minutes|quarters|decades?|centur(?:y|ies)"
    r"|z[- ]?(?:scor\w*|transformed)|percentiles?|standardi[sz]ed)\b"
)
# "two months after surgery" is a time, not the unit.
_SPAN = re.compile(
    r"\b(?:\d+|one|two|three|four|five|six|nine|ten|twelve)\W*\w+\s+(?:after|before|later|prior|ago|apart)\b"
)
_YEARS = re.compile(r"\b(?:years?|yrs?)\b")
# Time since conception: the age since birth is not known from it.
_BEFORE_BIRTH = re.compile(r"\b(?:post[- ]?(?:menstrual|conception)\w*|gestation\w*|conceptional|pma|pca)\b")


def age_unit(units: str | None, text: str) -> str | None:
    """The declared unit of a column of ages; `years`, `months`, `weeks` or `days` in any spelling are named so.

    Args:
        units: `Units` of its description.
        text: The words of its description. Without `Units`, phrases such as "in months" are taken; if there is none,
            other words for time than years: one that is not converted, or several, are the unit as they are.
    """
    described = text.lower().replace("_", " ")
    if units is None:
        found = {_UNIT_OF.get(match[1], match[1]) for match in _PHRASE.finditer(described)}
        if not found and not _YEARS.search(described):
            found = {_UNIT_OF.get(match[0], match[0]) for match in _ELSEWHERE.finditer(_SPAN.sub("", described))}
        unit = " or ".join(sorted(found))
    else:
        unit = known_unit(units) or units
    since = _BEFORE_BIRTH.search(f"{unit} {described}".lower())
    if unit != "years" and since:
        return unit if since[0] in unit.lower() else f"{unit or 'age'} ({since[0]})"
    return unit or None


def known_unit(text: str) -> str | None:
    """`years`, `months`, `weeks` or `days` if the text names one of these in any spelling, and nothing else."""
    words = re.findall(r"[a-z]+|[^\W_]", text.lower())
    units = {_UNIT_OF[word] for word in words if word in _UNIT_OF}
    others = [word for word in words if word not in _UNIT_OF and word not in _OTHER_WORDS]
    return units.pop() if len(units) == 1 and not others else None


def unit_key(text: str) -> str:
    """What is the same for two spellings of one unit: `mL` and `ml`, `point` and `points`."""
    return known_unit(text) or text.strip().lower().removesuffix("s")
