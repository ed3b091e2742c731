"""BCa intervals over subjects, against scipy and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from umbrella_train.evaluation.intervals import bca_interval, mean_statistic, wilson_figure
from umbrella_train.evaluation.regression import regression_statistics


def names(count: int) -> list[str]:
    return [f"sub-{number:04}" for number in range(count)]


def test_bca_interval_equals_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    ours = bca_interval(mean_statistic(values), subjects=names(60), seed=0)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    # Both are random; a percentile interval is 0.04 lower at its upper end.
    assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_bca_interval_draws_subjects_with_all_their_rows() -> None:
    values = np.random.default_rng(0).normal(size=40)
    once = bca_interval(mean_statistic(values), subjects=names(40), seed=0)
    repeated = mean_statistic(np.repeat(values, 10))
    by_subject = bca_interval(repeated, subjects=[name for name in names(40) for _ in range(10)], seed=0)
    as_independent = bca_interval(repeated, subjects=names(400), seed=0)
    assert (by_subject.lower, by_subject.upper) == pytest.approx((once.lower, once.upper))
    assert by_subject.upper - by_subject.lower > 2.5 * (as_independent.upper - as_independent.lower)


def test_bca_interval_of_few_subjects_and_equal_resamples() -> None:
    one = bca_interval(mean_statistic(np.array([3.0, 4.0])), subjects=["a", "a"], seed=0)
    assert one.value == 3.5
    assert math.isnan(one.lower)
    assert math.isnan(one.upper)
    assert math.isnan(bca_interval(mean_statistic(np.array([])), subjects=[], seed=0).value)
    constant = bca_interval(mean_statistic(np.full(7, 0.1)), subjects=names(7), seed=0)
    assert (constant.lower, constant.upper) == (constant.value, constant.value)


def test_bca_interval_leaves_out_resamples_without_a_value() -> None:
    # A third of the resamples of 2 of 3 equal answers are constant.
    answers, predicted = np.array([1.0, 1.0, 5.0]), np.array([1.0, 2.0, 3.0])
    figure = bca_interval(regression_statistics(answers, predicted)["r2"], subjects=names(3), seed=0)
    assert np.isfinite([figure.value, figure.lower, figure.upper]).all()


def test_bca_interval_is_a_function_of_its_seed() -> None:
    statistic = mean_statistic(np.random.default_rng(0).normal(size=30))
    first, second, other = (bca_interval(statistic, subjects=names(30), seed=seed) for seed in (1, 1, 2))
    assert first == second != other


def test_bca_interval_of_many_rows_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic = mean_statistic(np.random.default_rng(0).normal(size=90))
    whole = bca_interval(statistic, subjects=names(90), seed=0)
    monkeypatch.setattr("umbrella_train.evaluation.intervals.CHUNK_VALUES", 1000)
    assert bca_interval(statistic, subjects=names(90), seed=0) == whole
    monkeypatch.setattr("umbrella_train.evaluation.intervals._MAX_JACKKNIFE", 30)
    grouped = bca_interval(statistic, subjects=names(90), seed=0)
    assert (grouped.lower, grouped.upper) == pytest.approx((whole.lower, whole.upper), abs=0.02)


def test_wilson_figure_contains_its_proportion() -> None:
    for hits in range(31):
        figure = wilson_figure(hits / 30, count=30)
        assert 0 <= figure.lower <= figure.value <= figure.upper <= 1
    assert figure.lower == pytest.approx(30 / (30 + stats.norm.ppf(0.975) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 300])
@pytest.mark.parametrize("r2", [0.3, 0.52, 0.84])
def test_bca_intervals_of_r2_cover_the_known_value(count: int, r2: float) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for simulation in range(1000):
        predicted = rng.normal(size=count) * np.sqrt(r2)
        answers = predicted + rng.normal(size=count) * np.sqrt(1 - r2)
        statistic = regression_statistics(answers, predicted)["r2"]
        figure = bca_interval(statistic, subjects=names(count), seed=simulation)
        hits.append(figure.lower <= r2 <= figure.upper)
    assert 0.92 <= np.mean(hits) <= 0.98
