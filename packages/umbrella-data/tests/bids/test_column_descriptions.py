"""Levels, codes for missing values and numbers of JSON files."""

from __future__ import annotations

import pytest

from umbrella_data.bids.column_descriptions import is_same, parse_description, parse_number


def parse(entry):
    problems = []
    description = parse_description(entry, where="x", problems=problems)
    assert problems == []
    return description


@pytest.mark.parametrize(
    "word",
    ["missing", "Missing data", "not available", "N/A", "none given", "Unknown", "unknown / not reported", "Refused.",
     "Not done", "refusal", "skipped", "invalid", "n.a.", "Missing: scanner broke", "missing value (-1)", "Dont know",
     "Don\u2019t know", "participant refused", "no answer - refused",
     "not available (n/a)", "prefer not to say", "no answer", "Not applicable", "did not answer"],
)  # fmt: skip
def test_level_that_means_missing_is_a_code(word):
    description = parse({"Levels": {"1": "yes", "-8": word}})
    assert description.levels == {"1": "yes"}
    assert description.missing == ("-8", word)


@pytest.mark.parametrize("word", ["none", "unknown significance", "missing teeth", "no diagnosis", ".", "other"])
def test_level_with_another_word_is_a_value(word):
    assert parse({"Levels": {"0": word}}).levels == {"0": word}


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({"1": {"Description": "a  b"}}, {"1": "a b"}),
        ({"1": {"LongName": "a", "TermURL": "https://"}}, {"1": "a"}),
        ({"1": {"en": "a"}, "2": {"TermURL": "https://"}}, {"1": "a", "2": "2"}),
        ({"a": 1, "b": 2.0}, {"1": "a", "2.0": "b"}),
        ({"1": {}, "2": None, "3": ""}, {"1": "1", "2": "2", "3": "3"}),
        (["M", "F", 1], {"M": "M", "F": "F", "1": "1"}),
        (None, {}),
    ],
)
def test_levels_have_words_in_each_form(levels, words):
    assert parse({"Levels": levels}).levels == words


@pytest.mark.parametrize(
    "key",
    ["MissingValues", "MissingValue", "Missing", "missing_values", "MissingValueCodes", "MissingCodes", "NAValues",
     "NoDataValue"],
)  # fmt: skip
@pytest.mark.parametrize("value", [-9, "-9", [-9], {"-9": "refused"}])
def test_codes_are_declared_under_each_key(key, value):
    assert parse({key: value}).missing == ("-9",)


@pytest.mark.parametrize("text", ["-1,88", "-1;88", "-1 88", " -1 , 88 "])
def test_codes_in_one_text_are_split(text):
    assert parse({"MissingValues": text}).missing == ("-1", "88")
    assert parse({"MissingValues": "no data, NA, *"}).missing == ("no data", "NA", "*")


@pytest.mark.parametrize(
    "entry",
    [
        *({"MissingValues": text} for text in ("< 0", "1-5", "88 = refused", "below 0", "-9..-1", "negative numbers")),
        {"Levels": {"1": {"en": "a", "de": "b"}}},
        {"Levels": {"a": 1, "b": 1}},
    ],
)
def test_entry_that_cannot_be_read_is_a_problem_of_its_column(entry):
    problems = []
    parse_description(entry, where="'dx'", problems=problems)
    assert [problem.partition(":")[0] for problem in problems] == ["'dx'"]


@pytest.mark.parametrize("units", [None, "", "n/a", " None "])
def test_no_unit_is_none(units):
    assert parse({"Units": units}).units is None


def test_numbers_are_ascii_digits_with_a_point():
    assert [parse_number(text) for text in ("1", "-9.0", "+.5", "1e3")] == [1.0, -9.0, 0.5, 1000.0]
    assert [parse_number(text) for text in ("1_0", "nan", "inf", "1e999", "3,5", "٣", "", "89+")] == [None] * 8


def test_codes_are_compared_as_numbers_where_both_are():
    assert is_same("1.0", "1")
    assert is_same("Unknown", "unknown")
    assert not is_same("1", "one")
    assert not is_same("10", "1")
