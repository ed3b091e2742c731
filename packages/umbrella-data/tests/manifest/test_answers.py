"""An answer in words agrees with the scored value, or the row is reported."""

from __future__ import annotations

import pytest

from umbrella_data.manifest.answers import contradiction, read_number
from umbrella_data.manifest.sample import Answer, Sample, Turn

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
        ("right hippocampus", Answer("text", "left hippocampus"), "left"),
    ],
)
def test_words_that_contradict_the_value(words, answer, named):
    problem = contradiction(sample(words, answer))
    assert problem is not None
    assert named in problem


@pytest.mark.parametrize("text", ["1e999", "none", "1 or 2", "1aln"])
def test_number_that_cannot_be_read(text):
    assert read_number(text) is None
