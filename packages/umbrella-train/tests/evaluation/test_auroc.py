"""The area under the ROC curve and its interval, against scikit-learn, plain loops and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from umbrella_train.evaluation.auroc import auroc_statistic, delong_interval
from umbrella_train.evaluation.intervals import Figure, value_of


def names(count: int) -> list[str]:
    return [f"sub-{number:04}" for number in range(count)]


def logit_bounds(value: float, variance: float) -> tuple[float, float]:
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (value * (1 - value))
    centre = np.log(value / (1 - value))
    return 1 / (1 + np.exp(half - centre)), 1 / (1 + np.exp(-half - centre))


def plain_obuchowski(scores: np.ndarray, is_positive: np.ndarray, subjects: list[str]) -> tuple[float, float]:
    """AUROC and variance by the equations of Obuchowski (1997), in loops."""
    positive, negative = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)

    def wins(one: int, other: int) -> float:
        return float(scores[one] > scores[other]) + 0.5 * float(scores[one] == scores[other])

    v10 = {one: np.mean([wins(one, other) for other in negative]) for one in positive}
    v01 = {other: np.mean([wins(one, other) for one in positive]) for other in negative}
    area = float(np.mean(list(v10.values())))
    clusters = sorted(set(subjects))
    tens = {c: sum(v10[r] - area for r in positive if subjects[r] == c) for c in clusters}
    ones = {c: sum(v01[r] - area for r in negative if subjects[r] == c) for c in clusters}
    num_10 = len({subjects[r] for r in positive})
    num_01 = len({subjects[r] for r in negative})
    m, n, i = len(positive), len(negative), len(clusters)
    s10 = num_10 / ((num_10 - 1) * m) * sum(t**2 for t in tens.values())
    s01 = num_01 / ((num_01 - 1) * n) * sum(t**2 for t in ones.values())
    s11 = i / (i - 1) * sum(tens[c] * ones[c] for c in clusters)
    return area, s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows_per_subject", [1, 3])
def test_delong_interval_equals_plain_loops(seed: int, rows_per_subject: int) -> None:
    rng = np.random.default_rng(seed)
    is_positive = rng.random(45) < 0.4
    scores = np.round(rng.normal(size=45) + is_positive, 1)  # with ties
    subjects = [name for name in names(45 // rows_per_subject) for _ in range(rows_per_subject)]
    area, variance = plain_obuchowski(scores, is_positive, subjects)
    figure = delong_interval(scores, is_positive, subjects=subjects)
    assert figure.value == pytest.approx(area)
    assert figure.value == pytest.approx(roc_auc_score(is_positive, scores))
    assert (figure.lower, figure.upper) == pytest.approx(logit_bounds(area, variance))


def test_delong_variance_is_that_of_the_sample_variances() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 30), rng.normal(0, 1, 50)
    wins = positive[:, None] > negative
    variance = wins.mean(axis=1).var(ddof=1) / 30 + wins.mean(axis=0).var(ddof=1) / 50
    figure = delong_interval(np.r_[positive, negative], np.arange(80) < 30, subjects=names(80))
    assert (figure.lower, figure.upper) == pytest.approx(logit_bounds(wins.mean(), variance))


def test_delong_interval_is_wider_where_rows_of_a_subject_repeat() -> None:
    rng = np.random.default_rng(0)
    is_positive = np.arange(60) < 30
    scores = rng.normal(size=60) + is_positive
    once = delong_interval(scores, is_positive, subjects=names(60))
    rows = np.repeat(np.arange(60), 8)
    subjects = np.repeat(names(60), 8).tolist()
    repeated = delong_interval(scores[rows], is_positive[rows], subjects=subjects)
    independent = delong_interval(scores[rows], is_positive[rows], subjects=names(480))
    assert (repeated.lower, repeated.upper) == pytest.approx((once.lower, once.upper))
    assert repeated.upper - repeated.lower > 2.5 * (independent.upper - independent.lower)


@pytest.mark.parametrize("sign", [1, -1])
def test_delong_interval_of_perfect_scores_is_not_degenerate(sign: int) -> None:
    is_positive = np.arange(40) < 20
    figure = delong_interval(sign * is_positive.astype(float), is_positive, subjects=names(40))
    # Newcombe (2006), method 5: 1 - a = z sqrt(V(a)), with m = n = 20.
    bound = figure.lower if sign == 1 else 1 - figure.upper
    variance = bound * (1 - bound) / 400 * (1 + 19 * ((1 - bound) / (2 - bound) + bound / (1 + bound)))
    assert figure.value == (sign == 1)
    assert 1 - bound == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(variance), abs=1e-3)
    assert 0.85 < bound < 0.95


def test_delong_interval_of_equal_scores_and_of_few_rows() -> None:
    constant = delong_interval(np.zeros(30), np.arange(30) < 10, subjects=names(30))
    assert constant.value == 0.5
    assert constant.lower < 0.35
    assert constant.upper > 0.65
    two = delong_interval(np.array([0.1, 0.9]), np.array([False, True]), subjects=["a", "b"])
    assert two.value == two.upper == 1
    assert two.lower < 0.5
    one_subject = delong_interval(np.array([0.1, 0.9]), np.array([False, True]), subjects=["a", "a"])
    assert one_subject.value == 1
    assert math.isnan(one_subject.lower)
    for rows in (0, 1, 2):
        assert math.isnan(delong_interval(np.zeros(rows), np.ones(rows, dtype=bool), subjects=names(rows)).value)


def test_auroc_of_classes_is_their_mean_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(4, size=80)
    probabilities = rng.dirichlet(np.ones(4), size=80) + 0.3 * np.eye(4)[classes]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = roc_auc_score(classes, probabilities, multi_class="ovr", average="macro")
    is_answer = classes[:, None] == np.arange(4)
    figure = delong_interval(probabilities, is_answer, subjects=names(80))
    assert figure.value == pytest.approx(expected)
    assert value_of(auroc_statistic(probabilities, is_answer), num_rows=80) == pytest.approx(expected)
    # The influence of a row on the mean, by the infinitesimal jackknife.
    statistic = auroc_statistic(probabilities, is_answer)
    weights = np.ones((80, 80)) + 1e-6 * np.eye(80)
    influence = (statistic(weights) - figure.value) / 1e-6
    bounds = logit_bounds(figure.value, np.sum(influence**2))
    assert (figure.lower, figure.upper) == pytest.approx(bounds, abs=0.005)


def test_auroc_leaves_out_a_class_that_no_row_has() -> None:
    classes = np.array([0, 1] * 10)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    figure = delong_interval(probabilities, classes[:, None] == np.arange(3), subjects=names(20))
    both = [roc_auc_score(classes == k, probabilities[:, k]) for k in (0, 1)]
    assert figure.value == pytest.approx(np.mean(both))


def test_auroc_statistic_equals_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    is_positive, scores = np.arange(20) < 8, np.round(rng.normal(size=20), 1)
    counts = rng.integers(1, 4, size=(5, 20))
    repeated = [roc_auc_score(np.repeat(is_positive, row), np.repeat(scores, row)) for row in counts]
    assert auroc_statistic(scores, is_positive)(counts.astype(float)) == pytest.approx(repeated)


def covers(figure: Figure, area: float) -> bool:
    return figure.lower <= area <= figure.upper


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 300])
@pytest.mark.parametrize("area", [0.5, 0.7, 0.9, 0.96])
def test_delong_intervals_cover_the_known_area(count: int, area: float) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(1000):
        is_positive = rng.random(count) < 0.5
        scores = rng.normal(size=count) + np.sqrt(2) * stats.norm.ppf(area) * is_positive
        hits.append(covers(delong_interval(scores, is_positive, subjects=names(count)), area))
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("area", [0.7, 0.9])
def test_delong_intervals_cover_the_known_area_of_repeated_subjects(area: float) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(1000):
        is_positive = np.repeat(rng.random(60) < 0.5, 3)
        # Three scans of a subject: half of the variance is the subject's.
        scores = (np.repeat(rng.normal(size=60), 3) + rng.normal(size=180)) / np.sqrt(2)
        scores += np.sqrt(2) * stats.norm.ppf(area) * is_positive
        hits.append(covers(delong_interval(scores, is_positive, subjects=np.repeat(names(60), 3).tolist()), area))
    assert 0.92 <= np.mean(hits) <= 0.98
