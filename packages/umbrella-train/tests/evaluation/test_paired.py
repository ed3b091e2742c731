"""Differences of two models: values, intervals and permutation p-values."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from umbrella_train.evaluation.auroc import auroc_statistic
from umbrella_train.evaluation.intervals import mean_statistic
from umbrella_train.evaluation.paired import is_answered, paired_difference, paired_differences


def names(count: int) -> list[str]:
    return [f"sub-{number:04}" for number in range(count)]


def row(answer: str | float, *, kind: str = "choice", **values: Any) -> dict[str, Any]:
    return {"type": kind, "answer": answer, "unit": None, "generated": "", "score": None, "options": (), **values}


def test_p_is_that_of_all_exchanges_of_few_subjects() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.5, 1, size=(2, 8)) + np.array([[0.8], [0]])
    difference = paired_difference(mean_statistic(np.r_[first, second]), subjects=names(8), seed=0)
    distances = first - second
    plain = [abs(np.dot(signs, distances)) >= abs(distances.sum()) - 1e-9 for signs in product((1, -1), repeat=8)]
    assert difference.p == pytest.approx(np.mean(plain))
    assert difference.values == pytest.approx((first.mean(), second.mean()))
    assert difference.figure.value == pytest.approx(distances.mean())


def test_p_of_many_subjects_is_near_that_of_the_t_test() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 80)) + np.array([[0.25], [0]])
    difference = paired_difference(mean_statistic(np.r_[first, second]), subjects=names(80), seed=0)
    expected = stats.ttest_rel(first, second)
    assert 0.02 < expected.pvalue < 0.5
    assert difference.p == pytest.approx(expected.pvalue, abs=0.02)
    interval = expected.confidence_interval()
    assert (difference.figure.lower, difference.figure.upper) == pytest.approx(interval, abs=0.04)


def test_exchanges_keep_the_rows_of_a_subject_together() -> None:
    # Four subjects can be exchanged in 16 ways, whatever the number of their rows.
    values = np.r_[np.ones(40), np.zeros(40)]
    difference = paired_difference(mean_statistic(values), subjects=np.repeat(names(4), 10).tolist(), seed=0)
    assert difference.p == 2 / 16
    independent = paired_difference(mean_statistic(values), subjects=names(40), seed=0)
    assert independent.p == 1 / 10_001


def test_equal_models_do_not_differ() -> None:
    scores = np.tile(np.random.default_rng(0).normal(size=30), 2)
    statistic = auroc_statistic(scores, np.tile(np.arange(30) < 15, 2))
    difference = paired_difference(statistic, subjects=names(30), seed=0)
    assert (difference.figure.value, difference.figure.lower, difference.figure.upper, difference.p) == (0, 0, 0, 1)


def test_one_subject_has_no_interval_and_p_1() -> None:
    difference = paired_difference(mean_statistic(np.array([1.0, 0.0])), subjects=["a"], seed=0)
    assert difference.figure.value == difference.p == 1
    assert math.isnan(difference.figure.lower)


@pytest.mark.parametrize("num_options", [2, 3])
def test_differences_of_options_equal_scikit_learn(num_options: int) -> None:
    rng = np.random.default_rng(0)
    options = ["a", "b", "c"][:num_options]
    right = rng.integers(num_options, size=40)
    answers = [options[k] for k in right]
    probabilities = rng.dirichlet(np.ones(num_options), size=(2, 40)) * 0.6 + 0.4 * np.eye(num_options)[right]
    pairs = []
    for number, answer in enumerate(answers):
        scores = [np.log(probabilities[model, number]).tolist() for model in range(2)]
        hits = [float(options[int(np.argmax(each))] == answer) for each in scores]
        own = row(answer, options=options, option_scores=scores[0], score=hits[0])
        # Options in another order, and scores that are not normalised.
        other = row(answer, options=options[::-1], option_scores=[s - 7 for s in scores[1][::-1]], score=hits[1])
        pairs.append((own, other))
    differences = paired_differences(pairs, subjects=names(40), seed=0)
    assert differences.keys() == {"accuracy", "auroc", "brier"}
    for model in range(2):
        chances = probabilities[model]
        if num_options == 2:
            auroc, brier = sk.roc_auc_score(right, chances[:, 1]), sk.brier_score_loss(right, chances[:, 1])
        else:
            auroc = sk.roc_auc_score(right, chances, multi_class="ovr")
            brier = sk.brier_score_loss(answers, chances, labels=options)
        assert differences["accuracy"].values[model] == pytest.approx(np.mean(chances.argmax(axis=1) == right))
        assert differences["auroc"].values[model] == pytest.approx(auroc)
        assert differences["brier"].values[model] == pytest.approx(brier)
    for difference in differences.values():
        assert difference.figure.value == pytest.approx(difference.values[0] - difference.values[1])
        assert difference.figure.lower < difference.figure.value < difference.figure.upper
        assert 0 < difference.p <= 1


def test_auroc_of_permutations_does_not_depend_on_the_scale_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(2, 30)), np.arange(30) % 2

    def differ(scale: float) -> float:
        pairs = []
        for number, answer in enumerate(right):
            logits = [[0.0, float(scores[0, number])], [0.0, float(scores[1, number]) * scale]]
            pairs.append(tuple(row("ab"[answer], options=("a", "b"), option_scores=each, score=0.0) for each in logits))
        return paired_differences(pairs, subjects=names(30), seed=0)["auroc"].p

    assert differ(1) == differ(0.01) < 1


def test_options_without_scores_have_accuracy_alone() -> None:
    options = ("a", "b")
    plain = row("a", options=options, score=1.0)
    scored = row("a", options=options, score=0.0, option_scores=[-1.0, None])
    others = row("a", options=("a", "c"), score=0.0, option_scores=[-1.0, -2.0])
    for other in (scored, others):
        assert paired_differences([(plain, other)] * 3, subjects=names(3), seed=0).keys() == {"accuracy"}
    one_class = paired_differences([(scored, scored)] * 3, subjects=names(3), seed=0)
    assert one_class.keys() == {"accuracy", "brier"}  # a missing score is that of an impossible option


def test_differences_of_numbers_use_the_expected_value_or_the_text() -> None:
    answers = np.array([30.0, 40.0, 50.0, 70.0])
    expected, texts = [33.0, 41.0, 50.0, 60.0], ["20 years", "45", "40 years", "80"]
    numbers = [20, 45, 40, 80]
    pairs = [
        (
            row(answer, kind="number", unit="years", generated="x", expected=value, score=abs(value - answer)),
            row(answer, kind="number", unit="years", generated=text, score=abs(number - answer)),
        )
        for answer, value, text, number in zip(answers, expected, texts, numbers, strict=True)
    ]
    differences = paired_differences(pairs, subjects=names(4), seed=0)
    assert differences.keys() == {"error", "r2"}
    assert differences["error"].values == pytest.approx((3.5, 8.75))
    assert differences["r2"].values == pytest.approx((sk.r2_score(answers, expected), sk.r2_score(answers, numbers)))
    assert all(is_answered(each) for pair in pairs for each in pair)
    assert not is_answered(row(30.0, kind="number", generated="many"))


def test_differences_of_texts() -> None:
    pairs = [
        (
            row("left lobe", kind="text", generated="Left lobe.", score=1.0),
            row("left lobe", kind="text", generated="<think>left lobe</think>right lobe", score=0.0),
        )
    ] * 3
    differences = paired_differences(pairs, subjects=names(3), seed=0)
    assert {label: difference.values for label, difference in differences.items()} == {
        "exact_match": (1, 0),
        "token_f1": (1, 0.5),
    }


def null_p_values(num_simulations: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = []
    for simulation in range(num_simulations):
        is_positive = np.tile(rng.random(12) < 0.5, 2)
        scores = rng.normal(size=24) + is_positive
        statistic = auroc_statistic(scores, is_positive)
        found.append(paired_difference(statistic, subjects=names(12), seed=simulation).p)
    return np.array([p for p in found if math.isfinite(p)])


def test_p_values_are_uniform_without_a_difference() -> None:
    p = null_p_values(200, seed=0)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(p <= 0.05) <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, 60])
def test_p_values_of_many_simulations_are_uniform(count: int) -> None:
    rng = np.random.default_rng(1)
    found = []
    for simulation in range(1000):
        values = rng.normal(size=2 * count) + np.tile(rng.normal(size=count), 2)
        found.append(paired_difference(mean_statistic(values), subjects=names(count), seed=simulation).p)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    for level in (0.01, 0.05, 0.2):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 1000))
