"""Units of ages in the spellings of JSON files."""

from __future__ import annotations

import pytest

from umbrella_data.bids.age_unit import age_unit, unit_key


@pytest.mark.parametrize(
    ("units", "text", "unit"),
    [
        ("Years", "", "years"),
        ("decimal years", "", "years"),
        ("y.o.", "", "years"),
        ("mo", "", "months"),
        ("wk", "", "weeks"),
        ("d", "", "days"),
        ("hours", "", "hours"),
        ("months or years", "", "months or years"),
        ("12 months", "", "12 months"),
        ("years", "gestational age is another column", "years"),
        ("weeks", "Post-menstrual age", "weeks (post-menstrual)"),
        ("weeks PMA", "", "weeks PMA"),
        ("gestational weeks", "", "gestational weeks"),
        (None, "Age at scan, in months since birth", "months"),
        (None, "Age (in decimal years)", "years"),
        (None, "Age (weeks)", "weeks"),
        (None, "Age, days", "days"),
        (None, "Age in years, in months for infants", "months or years"),
        (None, "Age at scan, at least two months after surgery", None),
        (None, "Months since birth", "months"),
        (None, "Age in (decimal) months", "months"),
        (None, "Age \u2013 months", "months"),
        (None, "Age/weeks", "weeks"),
        (None, "Age in hours", "hours"),
        (None, "age in decades", "decades"),
        (None, "Age (hour)", "hour"),
        (None, "AGE_MONTHS", "months"),
        (None, "Age [d]", "days"),
        (None, "Age (m)", "m"),
        (None, "Age (y)", "years"),
        (None, "Z-scored age", "z-scored"),
        (None, "Standardised age", "standardised"),
        (None, "Age group, 0-24 months of life", "24 months"),
        (None, "Age: days, or months for children", "days or months"),
        (None, "Age at the day of the scan", None),
        (None, "Age at the month of the scan", None),
        (None, "Age at the scan, 6 months after surgery", None),
        (None, "Age, years; the scan was several days later", None),
        (None, "Gestational age", "age (gestational)"),
        (None, "", None),
    ],
)
def test_unit_is_read_from_units_or_a_phrase(units, text, unit):
    assert age_unit(units, text) == unit


def test_spellings_of_one_unit_have_one_key():
    assert unit_key("Points") == unit_key("point")
    assert unit_key("yr") == unit_key("years")
    assert unit_key("mm3") != unit_key("ml")
