"""Scores of each answer type, and their metrics."""

from __future__ import annotations

import pytest

from umbrella_data.bids.questions import ScanMetadata, number_question
from umbrella_data.manifest.sample import ANSWER_TYPES, Answer
from umbrella_train.evaluation.metrics import SCORERS, Condition, Prediction, score_answer, summarise

SEX = Answer(type="choice", value="female", options=("female", "male"))
AGE = Answer(type="number", value=63.0, unit="years")


def prediction(
    subject: str, score: float | None, *, condition: Condition = "accuracy", task: str = "sex", answer: Answer = SEX
) -> Prediction:
    return Prediction(
        subject=subject,
        task=task,
        modality="T1",
        condition=condition,
        question="?",
        type=answer.type,
        options=answer.options,
        answer=answer.value,
        unit=answer.unit,
        generated="",
        score=score,
        is_parsed=score is not None,
    )


def test_every_answer_type_has_a_scorer() -> None:
    assert set(SCORERS) == set(ANSWER_TYPES)


@pytest.mark.parametrize(
    ("generated", "value", "is_parsed"),
    [
        ("female", 1, True),
        (" Female.\n", 1, True),
        ('"FEMALE"', 1, True),
        ("male", 0, True),
        ("fe male", 0, False),
        ("female or male", 0, False),
        ("", 0, False),
    ],
)
def test_choice_is_the_option_itself(generated: str, value: float, is_parsed: bool) -> None:
    score = score_answer(generated, SEX)
    assert (score.value, score.is_parsed) == (value, is_parsed)


@pytest.mark.parametrize("value", [1512345.5, 1.234e-05, 7e-10, -38.78, 0.1 + 0.2, 2e15])
def test_number_in_the_form_of_the_training_data_has_no_error(value: float) -> None:
    question = number_question("volume", unit="mm3").ask(ScanMetadata("T1", labels={"volume": value}), draw=0)
    assert question is not None
    _, words, answer = question
    assert score_answer(words, Answer(**answer)).value == 0


@pytest.mark.parametrize(
    ("generated", "error"),
    [
        ("63", 0),
        ("60.5 years", 2.5),
        ("about 65 years.", 2),
        ("-1", 64),
        ("\N{MINUS SIGN}1", 64),
        ("1,063 years", 1000),
        ("6.3e1", 0),
        ("a T1 scan of a person of 63", 0),
    ],
)
def test_number_error_is_absolute(generated: str, error: float) -> None:
    score = score_answer(generated, AGE)
    assert score.is_parsed
    assert score.value == pytest.approx(error)


@pytest.mark.parametrize("generated", ["", "old", "63 or 64", "63-65 years", "63,5", "6.3.1", "1e999", "1aln", "1ed"])
def test_unreadable_number_has_no_error(generated: str) -> None:
    score = score_answer(generated, AGE)
    assert (score.value, score.is_parsed) == (None, False)


@pytest.mark.parametrize(
    ("generated", "answer", "parsed"),
    [
        (" Male. ", SEX, "male"),
        ("none", SEX, None),
        ("0 years", AGE, 0.0),
        ("old", AGE, None),
        ("A  Scan.", Answer(type="text", value="no"), "a scan"),
        (" . ", Answer(type="text", value="no"), None),
    ],
)
def test_score_has_what_the_text_was_read_as(generated: str, answer: Answer, parsed: str | float | None) -> None:
    score = score_answer(generated, answer)
    assert (score.parsed, score.is_parsed) == (parsed, parsed is not None)


def test_text_is_compared_without_case_and_punctuation() -> None:
    answer = Answer(type="text", value="A normal scan.")
    assert score_answer("a  normal scan", answer).value == 1
    assert score_answer("a scan", answer).value == 0


def test_unparsed_choices_count_as_misses() -> None:
    unread = Prediction(**{**prediction("c", 0.0).to_row(), "is_parsed": False})
    metrics = summarise([prediction("a", 1.0), prediction("b", 1.0), unread, prediction("d", 0.0)])
    assert metrics["eval/accuracy/T1"] == 0.5
    assert metrics["eval/unparsed/T1"] == 0.25
    assert (metrics["eval/questions/T1"], metrics["eval/subjects/T1"]) == (4, 4)


def test_conditions_have_separate_metrics() -> None:
    metrics = summarise(
        [
            prediction("a", 1.0),
            prediction("a", 0.0, condition="shuffled"),
            prediction("b", 1.0, condition="shuffled"),
            prediction("a", 0.0, condition="swapped"),
            prediction("a", 1.0, condition="no_scan"),
        ]
    )
    values = [metrics[f"eval/{name}/T1"] for name in ("accuracy", "shuffled", "swapped", "no_scan")]
    assert values == [1, 0.5, 0, 1]
    assert metrics["eval/accuracy/T1/sex"] == 1


def test_intervals_count_subjects_and_not_questions() -> None:
    once = summarise([prediction(f"s{i}", float(i % 2)) for i in range(10)])
    often = summarise([prediction(f"s{i}", float(i % 2)) for i in range(10) for _ in range(20)])
    assert often["eval/questions/T1"] == 200
    assert once["eval/accuracy_lower/T1"] == often["eval/accuracy_lower/T1"] == pytest.approx(0.2366, abs=1e-4)
    assert once["eval/accuracy_upper/T1"] == often["eval/accuracy_upper/T1"] == pytest.approx(0.7634, abs=1e-4)
    assert once["eval/chance_lower/T1"] == often["eval/chance_lower/T1"]


def test_chance_and_majority_are_baselines() -> None:
    four = Answer(type="choice", value="a", options=("a", "b", "c", "d"))
    male = Answer(type="choice", value="male", options=("female", "male"))
    members = [prediction("x", 1.0, task="letter", answer=four), prediction("y", 1.0, task="letter", answer=four)]
    members += [prediction("x", 1.0), prediction("y", 1.0, answer=male)]
    metrics = summarise(members)
    assert metrics["eval/chance/T1"] == pytest.approx(0.375)
    assert metrics["eval/majority/T1"] == 0.75
    assert metrics["eval/chance/T1/letter"] == 0.25
    assert metrics["eval/chance_lower/T1/sex"] == 0
    assert metrics["eval/chance_upper/T1/sex"] == 1


def test_the_best_constant_guess_is_the_median_of_the_right_answers() -> None:
    ages = [Answer(type="number", value=float(age), unit="years") for age in (20, 30, 80)]
    members = [prediction(f"s{age.value}", 1.0, task="age", answer=age) for age in ages]
    members += [prediction("s", 1.0, task="age", answer=ages[0], condition="shuffled")]
    assert summarise(members)["eval/error_constant/T1/age"] == pytest.approx((10 + 0 + 50) / 3)


def test_errors_are_means_by_task_with_intervals_and_controls() -> None:
    members = [prediction(f"s{i}", float(i), task="age", answer=AGE) for i in range(5)]
    members += [prediction(f"s{i}", 10.0, task="age", answer=AGE, condition="shuffled") for i in range(5)]
    members += [prediction("s9", None, task="age", answer=AGE)]
    metrics = summarise(members)
    assert metrics["eval/error/T1/age"] == 2
    assert 0 <= metrics["eval/error_lower/T1/age"] < 2 < metrics["eval/error_upper/T1/age"] <= 4
    assert metrics["eval/error_shuffled/T1/age"] == 10
    assert metrics["eval/error_constant/T1/age"] == 0  # all have the same age
    assert metrics["eval/unparsed/T1/age"] == pytest.approx(1 / 6)
    assert "eval/error/T1" not in metrics
    assert "eval/accuracy/T1" not in metrics
    assert "eval/questions/T1" not in metrics
