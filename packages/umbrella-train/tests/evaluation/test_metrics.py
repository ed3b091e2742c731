"""Scores of each answer type, and their metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from umbrella_data.bids.questions import ScanMetadata, number_question
from umbrella_data.manifest.sample import ANSWER_TYPES, Answer
from umbrella_train.evaluation.metrics import class_probabilities, fit_temperatures, summarise
from umbrella_train.evaluation.predictions import READERS, Condition, Prediction, Reply, read_reply

SEX = Answer(type="choice", value="female", options=("female", "male"))
AGE = Answer(type="number", value=63.0, unit="years")


def prediction(
    subject: str, reply: Reply, *, condition: Condition = "accuracy", task: str = "sex", answer: Answer = SEX
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
        **read_reply(reply, answer),
    )


@dataclass(frozen=True)
class Scored:
    """A generated text and its score."""

    value: float | None
    parsed: Any
    is_parsed: bool


def score_answer(generated: str, answer: Answer) -> Scored:
    read = read_reply(Reply(generated), answer)
    assert read["score"] == read["score_generated"]
    return Scored(read["score"], read["predicted"], read["is_parsed"])


def test_every_answer_type_has_a_reader() -> None:
    assert set(READERS) == set(ANSWER_TYPES)


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


def test_likelihoods_decide_and_the_text_is_scored_beside_them() -> None:
    choice = read_reply(Reply("male", option_scores=(-1.0, -2.0), option_lengths=(1, 1)), SEX)
    assert (choice["predicted"], choice["score"], choice["score_generated"]) == ("female", 1, 0)
    number = read_reply(Reply("60 years", expected=64.5, interval=(50.0, 70.0)), AGE)
    assert (number["predicted"], number["score"], number["score_generated"]) == (64.5, 1.5, 3)
    silent = read_reply(Reply(option_scores=(-2.0, -1.0), option_lengths=(1, 1)), SEX)
    assert (silent["predicted"], silent["score"], silent["score_generated"], silent["is_parsed"]) == (
        "male", 0, None, None,
    )  # fmt: skip


def test_a_prediction_is_read_from_its_row_also_of_an_earlier_version() -> None:
    one = prediction("a", Reply("x", option_scores=(-1.0, -2.0), option_lengths=(1, 2)))
    row = json.loads(json.dumps(one.to_row()))
    assert Prediction.from_row(row) == one
    for key in ("predicted", "option_scores", "option_lengths", "expected", "interval", "score_generated"):
        del row[key]
    assert Prediction.from_row({**row, "later": 1}).option_scores is None


def test_unparsed_choices_count_as_misses() -> None:
    said = ["female", "female", "?", "male"]
    metrics = summarise([prediction(f"s{number}", Reply(text)) for number, text in enumerate(said)])
    assert metrics["eval/accuracy/T1"] == metrics["eval/accuracy_generated/T1/sex"] == 0.5
    assert metrics["eval/unparsed/T1"] == 0.25
    assert (metrics["eval/questions/T1"], metrics["eval/subjects/T1"]) == (4, 4)


def test_conditions_have_separate_metrics() -> None:
    metrics = summarise(
        [
            prediction("a", Reply("female")),
            prediction("a", Reply("male"), condition="shuffled"),
            prediction("b", Reply("female"), condition="shuffled"),
            prediction("a", Reply("male"), condition="swapped"),
            prediction("a", Reply("female"), condition="no_scan"),
        ]
    )
    values = [metrics[f"eval/{name}/T1"] for name in ("accuracy", "shuffled", "swapped", "no_scan")]
    assert values == [1, 0.5, 0, 1]
    assert metrics["eval/accuracy/T1/sex"] == 1


def test_intervals_count_subjects_and_not_questions() -> None:
    said = [Reply("female"), Reply("male")]
    once = summarise([prediction(f"s{i}", said[i % 2]) for i in range(10)])
    often = summarise([prediction(f"s{i}", said[i % 2]) for i in range(10) for _ in range(20)])
    assert often["eval/questions/T1"] == 200
    assert once["eval/accuracy_lower/T1"] == often["eval/accuracy_lower/T1"] == pytest.approx(0.2366, abs=1e-4)
    assert once["eval/accuracy_upper/T1"] == often["eval/accuracy_upper/T1"] == pytest.approx(0.7634, abs=1e-4)
    assert once["eval/chance_lower/T1"] == often["eval/chance_lower/T1"]


def test_a_headline_is_of_one_task() -> None:
    four = Answer(type="choice", value="a", options=("a", "b", "c", "d"))
    male = Answer(type="choice", value="male", options=("female", "male"))
    members = [prediction(name, Reply("a"), task="letter", answer=four) for name in "xy"]
    members += [prediction("x", Reply("female")), prediction("y", Reply("male"), answer=male)]
    members += [prediction("x", Reply("60"), task="age", answer=AGE)]
    metrics = summarise(members)
    assert metrics["eval/chance/T1/letter"] == 0.25
    assert metrics["eval/majority/T1/sex"] == 0.5
    assert (metrics["eval/chance_lower/T1/sex"], metrics["eval/chance_upper/T1/sex"]) == (0, 1)
    assert "eval/accuracy/T1" not in metrics
    assert metrics["eval/error/T1"] == metrics["eval/error/T1/age"] == 3


def test_probabilities_have_their_figures_and_controls() -> None:
    male = Answer(type="choice", value="male", options=("female", "male"))
    answers = [SEX, male] * 10
    scores = [(-0.1, -2.0), (-3.0, -0.1)] * 9 + [(-0.1, -0.2), (-0.2, -0.3)]
    replies = [Reply(option_scores=each, option_lengths=(1, 2)) for each in scores]
    members = [prediction(f"s{i}", replies[i], answer=answers[i]) for i in range(20)]
    members += [prediction(f"s{i}", replies[0], answer=answers[i], condition="no_scan") for i in range(20)]
    metrics = summarise(members, temperatures={"T1/sex": 2.0})
    # (-0.2, -0.3) is closer to male than all females.
    assert metrics["eval/auroc/T1/sex"] == metrics["eval/auroc/T1"] == pytest.approx(99.5 / 100, abs=0.006)
    assert metrics["eval/accuracy/T1/sex"] == 0.95
    assert metrics["eval/sensitivity/T1/sex"] == 0.9
    assert metrics["eval/auroc_no_scan/T1/sex"] == 0.5
    assert "eval/brier_no_scan/T1/sex" not in metrics
    # Per token, male has twice the score of its sum.
    assert metrics["eval/accuracy_normalised/T1/sex"] == pytest.approx(1)
    assert "eval/accuracy_generated/T1/sex" not in metrics
    assert metrics["eval/temperature/T1/sex"] == 2
    assert metrics["eval/brier_scaled/T1/sex"] > metrics["eval/brier/T1/sex"]
    assert metrics["eval/overlaps/T1/sex"] == 0


def test_options_in_another_order_are_matched_and_other_options_are_not_compared() -> None:
    turned = Answer(type="choice", value="male", options=("male", "female"))
    members = [prediction(f"f{i}", Reply(option_scores=(-0.1, -2.0), option_lengths=(1, 1))) for i in range(5)]
    members += [
        prediction(f"m{i}", Reply(option_scores=(-0.1, -2.0), option_lengths=(1, 1)), answer=turned) for i in range(5)
    ]
    assert summarise(members)["eval/auroc/T1/sex"] == 1
    other = Answer(type="choice", value="male", options=("male", "female", "other"))
    reply = Reply(option_scores=(-0.1, -2.0, -3.0), option_lengths=(1, 1, 1))
    assert "eval/auroc/T1/sex" not in summarise([*members, prediction("o", reply, answer=other)])


def test_a_figure_at_the_level_of_its_control_overlaps_it() -> None:
    male = Answer(type="choice", value="male", options=("female", "male"))
    members = [
        prediction(
            f"s{i}",
            Reply(option_scores=(-0.1 * (i % 7), -0.2), option_lengths=(1, 1)),
            answer=(SEX, male)[i % 2],
            condition=condition,
        )
        for i in range(40)
        for condition in ("accuracy", "shuffled", "no_scan")
    ]
    assert summarise(members)["eval/overlaps/T1/sex"] == 2


def test_the_best_constant_guess_is_the_median_of_the_right_answers() -> None:
    ages = [Answer(type="number", value=float(age), unit="years") for age in (20, 30, 80)]
    members = [prediction(f"s{age.value}", Reply("30"), task="age", answer=age) for age in ages]
    members += [prediction("s", Reply("30"), task="age", answer=ages[0], condition="shuffled")]
    metrics = summarise(members)
    assert metrics["eval/error_constant/T1/age"] == pytest.approx((10 + 0 + 50) / 3)
    assert metrics["eval/rmse_constant/T1/age"] == pytest.approx(np.std([20, 30, 80]))


def test_numbers_have_the_figures_of_expected_values_with_coverage_and_controls() -> None:
    ages = [Answer(type="number", value=20.0 + 5 * i, unit="years") for i in range(10)]

    def reply(answer: Answer, miss: float, text: str | None = None) -> Reply:
        value = float(answer.value) + miss
        return Reply(text, expected=value, interval=(value - 3, value + 3))

    members = [prediction(f"s{i}", reply(age, (i % 5) - 2), task="age", answer=age) for i, age in enumerate(ages)]
    members += [
        prediction(f"s{i}", reply(age, 20), task="age", answer=age, condition="shuffled") for i, age in enumerate(ages)
    ]
    metrics = summarise(members)
    assert metrics["eval/error/T1/age"] == pytest.approx(1.2)
    assert metrics["eval/rmse/T1/age"] == pytest.approx(2**0.5)
    assert metrics["eval/r2/T1/age"] == pytest.approx(1 - 2 / np.var([age.value for age in ages]))
    assert metrics["eval/coverage/T1/age"] == 1
    assert metrics["eval/error_shuffled/T1/age"] == 20
    assert metrics["eval/overlaps/T1/age"] == 0
    assert "eval/error_generated/T1/age" not in metrics


def test_errors_of_texts_are_means_of_the_readable_ones() -> None:
    members = [prediction(f"s{i}", Reply(str(63 + i)), task="age", answer=AGE) for i in range(5)]
    members += [prediction("s9", Reply("old"), task="age", answer=AGE)]
    metrics = summarise(members)
    assert metrics["eval/error/T1/age"] == metrics["eval/error_generated/T1/age"] == 2
    assert 0 <= metrics["eval/error_lower/T1/age"] < 2 < metrics["eval/error_upper/T1/age"] <= 4
    assert metrics["eval/error_constant/T1/age"] == 0  # all have the same age
    assert metrics["eval/unparsed/T1/age"] == pytest.approx(1 / 6)
    assert "eval/accuracy/T1" not in metrics


def test_texts_that_are_all_right_have_an_interval() -> None:
    answer = Answer(type="text", value="left")
    metrics = summarise([prediction(f"s{i}", Reply("left"), task="report", answer=answer) for i in range(3)])
    for label in ("exact_match", "token_f1"):
        assert metrics[f"eval/{label}/T1/report"] == metrics[f"eval/{label}_upper/T1/report"] == 1
        assert metrics[f"eval/{label}_lower/T1/report"] == pytest.approx(0.4385, abs=1e-4)  # Wilson, 3 of 3


def test_counts_of_modalities_with_tasks_of_two_types_are_per_task() -> None:
    members = [prediction("a", Reply("female")), prediction("a", Reply("60"), task="age", answer=AGE)]
    metrics = summarise(members)
    assert metrics["eval/accuracy/T1"] == 1
    assert metrics["eval/error/T1"] == 3
    assert not {"eval/questions/T1", "eval/subjects/T1", "eval/unparsed/T1"} & metrics.keys()
    assert metrics["eval/questions/T1/sex"] == metrics["eval/questions/T1/age"] == 1


def test_likelihoods_that_are_not_finite_give_no_probabilities() -> None:
    members = [prediction(f"s{i}", Reply(option_scores=(-1.0, score), option_lengths=(1, 1))) for i, score in
               enumerate((-2.0, float("nan")))]  # fmt: skip
    assert class_probabilities(members[:1]) is not None
    assert class_probabilities(members) is None


def test_texts_have_their_scores_and_controls() -> None:
    answer = Answer(type="text", value="a lesion on the left")
    members = [prediction("a", Reply("a lesion on the left"), task="report", answer=answer)]
    members += [prediction("b", Reply("a lesion on the right"), task="report", answer=answer)]
    members += [prediction("a", Reply("no"), task="report", answer=answer, condition="no_scan")]
    metrics = summarise(members)
    assert metrics["eval/exact_match/T1/report"] == 0.5
    assert metrics["eval/token_f1/T1/report"] == pytest.approx(0.9)
    assert metrics["eval/laterality_f1/T1/report"] == 0.5
    assert metrics["eval/token_f1_no_scan/T1/report"] == 0
    assert "eval/rouge_l_no_scan/T1/report" not in metrics
    assert "eval/accuracy/T1/report" not in metrics


def test_the_temperature_is_that_of_calibrated_probabilities() -> None:
    dice = np.random.default_rng(0)
    members = []
    for number in range(400):
        logit = dice.normal(0, 2)
        value = ("female", "male")[int(dice.random() < 1 / (1 + np.exp(-logit)))]
        # Three times too sure.
        reply = Reply(option_scores=(0.0, 3 * logit), option_lengths=(1, 1))
        answer = Answer(type="choice", value=value, options=("female", "male"))
        members.append(prediction(f"s{number}", reply, answer=answer))
    temperature = fit_temperatures(members)["T1/sex"]
    assert temperature == pytest.approx(3, rel=0.2)
    metrics = summarise(members, temperatures={"T1/sex": temperature})
    assert metrics["eval/calibration_error_scaled/T1/sex"] < metrics["eval/calibration_error/T1/sex"] / 2
    assert fit_temperatures([prediction("a", Reply("63"), task="age", answer=AGE)]) == {}
