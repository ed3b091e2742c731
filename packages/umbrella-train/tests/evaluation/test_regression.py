"""Figures of questions about numbers, against scikit-learn and scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from umbrella_train.evaluation.intervals import evaluate
from umbrella_train.evaluation.regression import (
    expected_value,
    interval_coverage,
    regression_figures,
    regression_statistics,
)


def names(count: int) -> list[str]:
    return [f"sub-{number:04}" for number in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn_and_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = np.round(rng.uniform(20, 80, size=40))  # with ties
    predicted = np.round(0.6 * answers + rng.normal(0, 8, size=40))
    figures = regression_figures(answers, predicted, subjects=names(40), seed=0)
    assert {label: figure.value for label, figure in figures.items()} == pytest.approx(
        {
            "error": sk.mean_absolute_error(answers, predicted),
            "rmse": sk.root_mean_squared_error(answers, predicted),
            "r2": sk.r2_score(answers, predicted),
            "pearson": stats.pearsonr(answers, predicted).statistic,
            "spearman": stats.spearmanr(answers, predicted).statistic,
            "bias_slope": stats.linregress(answers, predicted - answers).slope,
        }
    )
    assert all(figure.lower < figure.value < figure.upper for figure in figures.values())


def test_resamples_equal_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    answers, predicted = np.round(rng.normal(size=(2, 25)), 1)
    counts = rng.integers(0, 4, size=(5, 25))
    statistics = regression_statistics(answers, predicted)
    for row in counts:
        repeated = regression_statistics(np.repeat(answers, row), np.repeat(predicted, row))
        for label, statistic in statistics.items():
            expected = repeated[label](np.ones((1, row.sum())))
            assert statistic(row[None].astype(float)) == pytest.approx(expected), label


def test_resamples_of_one_value_are_undefined_despite_rounding_errors() -> None:
    rng = np.random.default_rng(0)
    answers = np.array([1000.1, 1000.1, 1000.1, 70.7])
    weights = np.hstack([rng.integers(1, 9, size=(200, 3)), np.zeros((200, 1))])
    statistics = regression_statistics(answers, np.array([1.0, 2.0, 3.0, 4.0]))
    for label in ("r2", "pearson", "spearman", "bias_slope"):
        assert np.isnan(evaluate(statistics[label], weights)).all(), label


def test_bias_slope_is_0_without_regression_to_the_mean_and_minus_1_for_a_constant() -> None:
    answers = np.arange(20.0)
    figures = regression_figures(answers, answers + 3, subjects=names(20), seed=0)
    assert figures["bias_slope"].value == pytest.approx(0, abs=1e-12)
    constant = regression_figures(answers, np.full(20, 9.5), subjects=names(20), seed=0)
    assert constant["bias_slope"].value == pytest.approx(-1)
    assert constant["r2"].value == pytest.approx(0)
    assert constant.keys() == {"error", "rmse", "r2", "bias_slope"}


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3])
@pytest.mark.parametrize("values", [(0.1, 0.1), (1e9, 1e9 + 1), (0.1, 0.7)])
def test_figures_of_few_or_constant_rows_have_no_warnings(num_rows: int, values: tuple[float, float]) -> None:
    answers = np.array([values[row % 2] for row in range(num_rows)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = regression_figures(answers, answers[::-1] + 0.5, subjects=names(num_rows), seed=0)
    has_spread = num_rows > 1 and values[0] != values[1]
    assert ("error" in figures) == (num_rows > 0)
    assert ("r2" in figures) == ("pearson" in figures) == has_spread


def test_several_rows_of_a_subject_widen_every_interval() -> None:
    rng = np.random.default_rng(0)
    answers = rng.normal(50, 10, size=50)
    predicted = answers + rng.normal(0, 6, size=50)
    rows = np.repeat(np.arange(50), 6)
    by_subject, independent = (
        regression_figures(answers[rows], predicted[rows], subjects=subjects, seed=0)
        for subjects in (np.repeat(names(50), 6).tolist(), names(300))
    )
    for label, figure in by_subject.items():
        assert figure.upper - figure.lower > 1.8 * (independent[label].upper - independent[label].lower), label


def test_figures_of_other_inputs_are_rejected() -> None:
    for answers, predicted, count in ((np.zeros(2), np.zeros(3), 2), (np.zeros(2), np.zeros(2), 3)):
        with pytest.raises(ValueError, match="length"):
            regression_figures(answers, predicted, subjects=names(count), seed=0)
    with pytest.raises(ValueError, match="finite"):
        regression_figures(np.array([1.0, np.nan]), np.zeros(2), subjects=names(2), seed=0)


def test_expected_value_equals_enumeration() -> None:
    values, log_scores = np.array([30.0, 10.0, 20.0]), np.log([0.25, 0.05, 0.7]) - 1000
    assert expected_value(values, log_scores) == pytest.approx((22, 20, 30))
    uniform = expected_value(np.arange(10.0), np.zeros(10))
    assert uniform == pytest.approx((4.5, 0, 8))  # the cumulative probabilities reach 0.1 and 0.9 exactly
    assert expected_value(np.array([7.0]), np.array([-3.0])) == (7, 7, 7)
    assert expected_value(np.array([1.0, 2.0]), np.array([-np.inf, -9.0])) == (2, 2, 2)


def test_expected_value_of_impossible_scores_is_rejected() -> None:
    for values, scores in (([], []), ([1.0], [-np.inf]), ([1.0, 2.0], [0.0, np.nan]), ([1.0], [0.0, 0.0])):
        with pytest.raises(ValueError, match="log_scores"):
            expected_value(np.array(values), np.array(scores))


def test_interval_coverage_counts_bounds_and_subjects() -> None:
    answers, lower, upper = np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 0, 0, 0]), np.array([5.0, 2.0, 5.0, 5.0])
    figure = interval_coverage(answers, lower, upper, subjects=names(4))
    assert figure.value == 0.75
    theirs = stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert (figure.lower, figure.upper) == pytest.approx((theirs.low, theirs.high))
    assert interval_coverage(answers, lower, upper, subjects=["a", "a", "b", "b"]).lower < figure.lower
    with pytest.raises(ValueError, match="at least 1"):
        interval_coverage(*[np.array([])] * 3, subjects=[])
