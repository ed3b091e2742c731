"""The possible answers of each task, as training words them."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn
from umbrella_train.evaluation.answer_space import (
    MAX_CANDIDATES,
    AnswerSpace,
    collect_answer_spaces,
    find_answer_space,
    read_answer_spaces,
    write_answer_spaces,
)


def sample(words: str, answer: Answer | None, *, task: str = "task") -> Sample:
    turns = (Turn("user", (Scan("T1", (Path("a.nii"),)), "?")), Turn("assistant", (words,)))
    return Sample(id="i", subject="s", task=task, messages=turns, answer=answer)


def number(value: float, words: str) -> Sample:
    return sample(words, Answer("number", value, unit="years"))


def test_options_are_in_the_commonest_words_of_training() -> None:
    sexes = [("Female.", "female"), ("Female.", "female"), ("female", "female"), ("Male.", "male")]
    rows = [sample(words, Answer("choice", value, options=("female", "male"))) for words, value in sexes]
    space = collect_answer_spaces(rows)["T1/task"]
    assert space.option_texts(["female", "male", "unknown"]) == ["Female.", "Male.", "unknown"]


def test_numbers_are_in_the_words_and_range_of_training() -> None:
    rows = [number(31, "The age is 31 years."), number(33, "The age is 33 years."), number(35, "35")]
    space = collect_answer_spaces(rows)["T1/task"]
    assert space.numbers() == [31, 32, 33, 34, 35]
    assert space.number_text(32) == "The age is 32 years."
    assert space.numbers([0, 2, 0.4]) == [0, 1, 2]


def test_decimals_are_those_of_training() -> None:
    fixed = collect_answer_spaces([number(1.5, "1.50"), number(1.52, "1.52")])["T1/task"]
    assert [fixed.number_text(value) for value in fixed.numbers()] == ["1.50", "1.51", "1.52"]
    # As `from-bids` writes them: without zeros at the end.
    shortest = collect_answer_spaces([number(2.5, "2.5"), number(2.49, "2.49"), number(2.51, "2.51")])["T1/task"]
    assert [shortest.number_text(value) for value in shortest.numbers()] == ["2.49", "2.5", "2.51"]
    rounded = collect_answer_spaces([number(20.6, "20.6"), number(22.4, "22.4")], decimals=0)["T1/task"]
    assert [rounded.number_text(value) for value in rounded.numbers()] == ["21", "22"]
    assert (rounded.minimum, rounded.maximum) == (21, 22)


def test_options_in_another_letter_case_have_the_words_of_training() -> None:
    space = collect_answer_spaces([sample("Female.", Answer("choice", "female", options=("female", "male")))])
    assert space["T1/task"].option_texts(["FEMALE", "Male"]) == ["Female.", "Male"]


def test_reasoning_before_an_answer_is_no_part_of_its_words() -> None:
    thought = "<think>\nAbout 40?\n</think>\n\n"
    rows = [sample(f"{thought}left", Answer("choice", "left", options=("left", "right")))]
    assert collect_answer_spaces(rows)["T1/task"].option_texts(["left"]) == ["left"]
    assert collect_answer_spaces([number(41, f"{thought}41 years")])["T1/task"].number_text(3) == "3 years"


def test_numbers_have_the_commas_and_signs_of_training() -> None:
    rows = [sample(words, Answer("number", value, unit="mm³")) for words, value in
            (("980 mm³", 980), ("990 mm³", 990), ("1,020 mm³", 1020))]  # fmt: skip
    space = collect_answer_spaces(rows)["T1/task"]
    assert [space.number_text(each) for each in (999, 1000, 1234567)] == ["999 mm³", "1,000 mm³", "1,234,567 mm³"]
    plain = collect_answer_spaces([number(1234, "1234 mm³")])["T1/task"]
    assert plain.number_text(1235) == "1235 mm³"


@pytest.mark.parametrize(("low", "high"), [(0, 500), (1000, 1_512_345), (-20, 1000), (0.001, 0.9)])
def test_a_wide_range_has_a_wider_step(low: float, high: float) -> None:
    numbers = collect_answer_spaces([number(low, f"{low}"), number(high, f"{high}")])["T1/task"].numbers()
    assert MAX_CANDIDATES / 2 < len(numbers) <= MAX_CANDIDATES
    assert numbers[0] == pytest.approx(low, abs=0.1)
    assert high - (numbers[1] - numbers[0]) < numbers[-1] <= high
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("words", ["1.2e-5", "forty", "between 3 and 4"])
def test_numbers_that_are_not_in_plain_digits_have_no_space(words: str) -> None:
    assert collect_answer_spaces([number(4, words)]) == {}


def test_a_task_with_other_modalities_than_in_training_has_its_space() -> None:
    spaces = {"T1+dMRI/task": AnswerSpace(minimum=1.0), "T1/age": AnswerSpace(minimum=2.0)}
    assert find_answer_space(spaces, sample("x", None)) == spaces["T1+dMRI/task"]
    assert find_answer_space(spaces, sample("x", None, task="sex")) is None
    spaces["T1/task"] = AnswerSpace(minimum=3.0)
    assert find_answer_space(spaces, sample("x", None)) == spaces["T1/task"]


def test_spaces_are_read_as_they_were_written(tmp_path: Path) -> None:
    spaces = {"T1/age": AnswerSpace(frame="0 years", minimum=20.0, maximum=30.0), "T1/sex": AnswerSpace({"f": "F"})}
    write_answer_spaces(tmp_path / "answers.json", spaces)
    assert read_answer_spaces(tmp_path / "answers.json") == spaces
    assert read_answer_spaces(tmp_path / "none.json") == {}


def test_rows_without_an_answer_or_of_texts_do_not_count() -> None:
    assert collect_answer_spaces([sample("x", None), sample("x", Answer("text", "x"))]) == {}
