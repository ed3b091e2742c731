"""Intervals against published and independent values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from umbrella_train.evaluation.intervals import binomial_interval, bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (5, 10), (75, 100), (64, 64)])
def test_wilson_interval_equals_scipys(hits: int, count: int) -> None:
    theirs = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits / count, count=count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_binomial_interval_contains_95_percent_of_guesses() -> None:
    lower, upper = binomial_interval(0.5, count=64)
    assert (lower * 64, upper * 64) == (24, 40)
    guesses = np.random.default_rng(0).binomial(64, 0.5, size=20_000) / 64
    assert np.mean((guesses >= lower) & (guesses <= upper)) >= 0.95


def test_bootstrap_interval_resamples_subjects() -> None:
    values = [float(i % 10) for i in range(10)]
    subjects = [str(i) for i in range(10)]
    once = bootstrap_interval(values, subjects=subjects, seed=0)
    # 50 questions per subject do not narrow the interval.
    assert bootstrap_interval(values * 50, subjects=subjects * 50, seed=0) == pytest.approx(once)
    assert bootstrap_interval(values * 50, subjects=[str(i) for i in range(500)], seed=0)[0] > once[0] + 1


def test_bootstrap_interval_depends_on_its_seed() -> None:
    arguments = {"values": [1.0, 2.0, 5.0], "subjects": ["a", "b", "c"]}
    assert bootstrap_interval(**arguments, seed=1) == bootstrap_interval(**arguments, seed=1)


def test_intervals_without_observations_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least 1 observation"):
        wilson_interval(0.5, count=0)
    with pytest.raises(ValueError, match="at least 1 observation"):
        binomial_interval(0.5, count=0)
    with pytest.raises(ValueError, match="at least 1 observation"):
        bootstrap_interval([], subjects=[], seed=0)
