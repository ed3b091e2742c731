"""Figures of questions about numbers, each with a 95 % interval over subjects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from umbrella_train.evaluation.intervals import (
    Figure,
    Statistic,
    Weights,
    bca_interval,
    mean_statistic,
    wilson_figure,
)

Values = NDArray[np.float64]
# The central 80 %.
_TAILS = (0.1, 0.9)
# Variances below this part of that of all rows are rounding errors of constant values.
_ROUNDING = 1e-12


def regression_figures(answers: Values, predicted: Values, *, subjects: Sequence[str], seed: int) -> dict[str, Figure]:
    """Figures of predicted numbers, with BCa intervals over subjects.

    - `error`: mean absolute error, in the unit of the answers; `rmse`: root of the mean squared error.
    - `r2`: 1 - the sum of squared errors / that of the mean answer of these rows; negative for worse predictions.
    - `pearson`, `spearman`: correlations of answers and predictions.
    - `bias_slope`: slope of the error (predicted - answer) by the answer: 0 without regression to the mean, -1 for a
      constant prediction.

    Args:
        answers: The right numbers, (N,).
        predicted: The predicted ones, (N,).
        subjects: Subject of each row, (N,).
        seed: Seed of the resamples.

    Returns:
        Figures by label. Undefined ones, as a correlation with constant values, are absent.

    Raises:
        ValueError: For values that are not finite, or arguments of different lengths.
    """
    answers, predicted = np.asarray(answers, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if not answers.shape == predicted.shape == (len(subjects),):
        raise ValueError(
            f"answers {answers.shape}, predicted {predicted.shape} and {len(subjects)} subjects need one length"
        )
    if not (np.isfinite(answers).all() and np.isfinite(predicted).all()):
        raise ValueError("answers and predicted have values that are not finite; leave out such rows")
    if not len(answers):
        return {}
    figures = {
        label: bca_interval(statistic, subjects=subjects, seed=seed)
        for label, statistic in regression_statistics(answers, predicted).items()
    }
    return {label: figure for label, figure in figures.items() if np.isfinite(figure.value)}


def regression_statistics(answers: Values, predicted: Values) -> dict[str, Statistic]:
    """The figures of `regression_figures` as functions of the weights of rows."""
    errors = predicted - answers
    mean_error, mean_square = mean_statistic(np.abs(errors)), mean_statistic(errors**2)
    by_rank_answers, by_rank_predicted = _rank_function(answers), _rank_function(predicted)

    def r2(weights: Weights) -> Values:
        return 1 - mean_square(weights) / _covariance(weights, answers, answers)

    def pearson(weights: Weights) -> Values:
        return _correlation(weights, answers, predicted)

    def spearman(weights: Weights) -> Values:
        return _correlation(weights, by_rank_answers(weights), by_rank_predicted(weights))

    def bias_slope(weights: Weights) -> Values:
        return _covariance(weights, errors, answers) / _covariance(weights, answers, answers)

    return {
        "error": mean_error,
        "rmse": lambda weights: np.sqrt(mean_square(weights)),
        "r2": r2,
        "pearson": pearson,
        "spearman": spearman,
        "bias_slope": bias_slope,
    }


def _weighted_mean(weights: Weights, values: Values) -> Values:
    total: Values = weights @ values if values.ndim == 1 else np.einsum("rn,rn->r", weights, values)
    return total / weights.sum(axis=1)


def _covariance(weights: Weights, one: Values, other: Values) -> Values:
    """Weighted covariances (R,) of values (N,) or (R, N); NaN for the variance of constant values."""
    # Centred once, so that values far from 0 lose no digits.
    one, other, is_variance = one - one.mean(), other - other.mean(), one is other
    product = _weighted_mean(weights, one * other) - _weighted_mean(weights, one) * _weighted_mean(weights, other)
    if is_variance:
        product = np.where(product > _ROUNDING * max(float(np.mean(one**2)), 1e-300), product, np.nan)
    return product


def _correlation(weights: Weights, one: Values, other: Values) -> Values:
    variances = _covariance(weights, one, one) * _covariance(weights, other, other)
    return np.clip(_covariance(weights, one, other) / np.sqrt(variances), -1, 1)


def _rank_function(values: Values) -> Statistic:
    """A function of weights (R, N) that returns the mean rank of each row in each resample, (R, N)."""
    unique, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], unique)

    def ranks(weights: Weights) -> Values:
        by_value = np.add.reduceat(weights[:, order], starts, axis=1)
        middle = np.cumsum(by_value, axis=1) - by_value / 2
        return middle[:, inverse]

    return ranks


def expected_value(values: Values, log_scores: Values) -> tuple[float, float, float]:
    """Mean and central 80 % interval of the distribution over candidate numbers.

    Args:
        values: The candidates, (G,).
        log_scores: Natural logarithm of each one's likelihood, (G,), up to a constant.

    Returns:
        The mean; the smallest candidates at which the cumulative probability is at least 0.1, and 0.9.

    Raises:
        ValueError: Without candidates, for values that are not finite, or without a finite score; -inf is possible.
    """
    from scipy.special import softmax  # late: takes a fraction of a second

    values, log_scores = np.asarray(values, dtype=np.float64), np.asarray(log_scores, dtype=np.float64)
    if not len(values) or values.shape != log_scores.shape:
        raise ValueError(f"values {values.shape} and log_scores {log_scores.shape} need one length of at least 1")
    if not np.isfinite(log_scores.max()) or not np.isfinite(values).all():
        raise ValueError("values must be finite, and log_scores finite or -inf, with one finite score at least")
    shares = softmax(log_scores)
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(shares[order])
    # Rounding errors of the sum must not move a bound by one candidate.
    lower, upper = (values[order][np.argmax(cumulative >= tail - 1e-9)] for tail in _TAILS)
    return float(shares @ values), float(lower), float(upper)


def interval_coverage(answers: Values, lower: Values, upper: Values, *, subjects: Sequence[str]) -> Figure:
    """The fraction of answers within their intervals, bounds included, with Wilson's interval over subjects.

    Args:
        answers: The right numbers, (N,), at least one.
        lower: Lower bounds, (N,).
        upper: Upper bounds, (N,).
        subjects: Subject of each row, (N,).

    Raises:
        ValueError: Without answers.
    """
    share = float(np.mean((answers >= lower) & (answers <= upper))) if len(answers) else 0.0
    return wilson_figure(share, count=len(set(subjects)))
