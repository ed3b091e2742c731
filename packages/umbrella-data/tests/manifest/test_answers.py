"""An answer in words agrees with the scored value, or the row is reported."""

from __future__ import annotations

import pytest

from umbrella_data.manifest.answers import contradiction, count_decimals, read_choice, read_number, replace_number
from umbrella_data.manifest.sample import Answer, Sample, Turn, subject_key

SEX = Answer("choice", "female", options=("female", "male"))


def sample(words: str, answer: Answer | None) -> Sample:
    return Sample("a", "sub-01", "task", (Turn("user", ("?",)), Turn("assistant", (words,))), answer)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("female", SEX),
        (" Female. ", SEX),
        ("41 years", Answer("number", 41.0, unit="years")),
        ("41", Answer("number", 41.3)),
        ("41.3", Answer("number", 41.32)),
        ("-1,200.5", Answer("number", -1200.5)),
        ("41 years", Answer("number", 41.0, unit="yrs")),
        ("3", Answer("number", 2.5)),
        ("70", Answer("number", 70.4)),
        ("0.8", Answer("number", 0.82)),
        ("minus 41", Answer("number", -41.0)),
        ("- 41", Answer("number", -41.0)),
        ("\u201341 days", Answer("number", -41.0, unit="days")),
        ("left hippocampus", Answer("text", "Left hippocampus")),
        ("anything", None),
    ],
)
def test_words_that_agree(words, answer):
    assert contradiction(sample(words, answer)) is None


@pytest.mark.parametrize(
    ("words", "answer", "named"),
    [
        ("male", SEX, "'female'"),
        ("unknown", SEX, "none of the options"),
        ("The person is female", SEX, "none of the options"),
        ("42 years", Answer("number", 41.0), "41.0"),
        ("41.4", Answer("number", 41.32), "41.32"),
        ("forty-one", Answer("number", 41.0), "41.0"),
        ("between 40 and 42", Answer("number", 41.0), "41.0"),
        *(
            (words, Answer("number", 41.0, unit="years"), "41.0")
            for words in (
                "41 months",
                "41-day",
                "minus 41",
                "- 41",
                "\u201341",
                "> 41",
                "\u2264 41",
                "not 41",
                "41 thousand",
                "at least 41",
            )
        ),
        ("0", Answer("number", 0.49), "0.49"),
        ("0", Answer("number", -0.5), "-0.5"),
        ("0.0", Answer("number", 0.04), "0.04"),
        (".5", Answer("choice", "5", options=("5", "6")), "none of the options"),
        ("right hippocampus", Answer("text", "left hippocampus"), "left"),
    ],
)
def test_words_that_contradict_the_value(words, answer, named):
    problem = contradiction(sample(words, answer))
    assert problem is not None
    assert named in problem


@pytest.mark.parametrize("text", ["1e999", "none", "1 or 2", "1aln", "> 41", "not 41", "41 million"])
def test_number_that_cannot_be_read(text):
    assert read_number(text) is None


@pytest.mark.parametrize("text", ["41", "Age - 41", "<answer>41</answer>", "age-> 41 y", "**41 years**", "It is 41."])
def test_number_in_an_ordinary_answer_is_read(text):
    assert read_number(text, unit="years") == 41.0


def test_number_in_another_unit_of_time_cannot_be_read():
    assert read_number("41 months", unit="years") is None
    assert read_number("41 months") == read_number("41 months", unit="mo") == read_number("41", unit="mo") == 41.0


def test_spellings_of_a_subject_have_one_key():
    assert {subject_key(name) for name in ("sub-cafe\u0301", " SUB-caf\xe9 ", "caf\xe9")} == {"caf\xe9"}
    assert subject_key("sub-A") != subject_key("sub-a")


def test_answer_is_read_after_its_reasoning():
    reasoning = "<think>\nThe ventricles are 12 mm wide, as in men.\n</think>\n\n"
    assert read_choice(reasoning + "female", ("female", "male")) == "female"
    assert read_number(reasoning + "41 years", unit="years") == 41
    # The prompt may have opened the block.
    assert read_number("12 mm\n</think>\n\n41") == 41
    assert read_number("<think>\n12 mm") is None


@pytest.mark.parametrize(
    ("words", "value", "decimals", "written"),
    [
        ("41.23 years", 41.23, 0, "41 years"),
        ("41 years", 41.23, 2, "41.23 years"),
        ("About 41.", 40.0, 1, "About 40.0."),
        ("1,234.5 ml", 12345.678, 1, "12,345.7 ml"),
        ("minus 41.2", -3.14, 1, "-3.1"),
        ("41", -0.2, 0, "0"),
        ("1.5e3 ml", 1500.0, 0, "1500 ml"),
        ("12 mm³ … in T1", 15.0, 0, "15 mm³ … in T1"),
        ("<think>8 or 9: 41.23</think>\n\n41.23 years", 41.23, 0, "<think>8 or 9: 41.23</think>\n\n41 years"),
    ],
)
def test_number_is_replaced_where_it_is_read(words, value, decimals, written):
    assert replace_number(words, value, decimals=decimals) == written
    assert read_number(written) == float(f"{value:.{decimals}f}")


def test_number_is_not_replaced_in_words_that_hold_none():
    for words in ("forty", "40 or 41", "more than 40"):
        with pytest.raises(ValueError, match="no readable number"):
            replace_number(words, 1.0, decimals=0)


@pytest.mark.parametrize(
    ("words", "decimals"), [("41 years", 0), ("41.20", 2), ("1.25e1", 1), ("12e3", 0), ("none", 0)]
)
def test_decimals_are_those_of_the_number(words, decimals):
    assert count_decimals(words) == decimals
