"""The area under the ROC curve, its interval (DeLong 1988, with clusters as in Obuchowski 1997), and its resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from umbrella_train.evaluation.intervals import LEVEL, Figure, Statistic, Weights

Scores = NDArray[np.float64]
Classes = NDArray[np.bool_]


def delong_interval(scores: Scores, is_positive: Classes, *, subjects: Sequence[str]) -> Figure:
    """The AUROC and its interval: DeLong's variance on the logit scale, which keeps the bounds within 0 and 1.

    Rows of one subject are one cluster (Obuchowski 1997); with one row for each subject, the variance is that of
    DeLong, DeLong and Clarke-Pearson (1988). Where it is 0 or undefined, as for an AUROC of exactly 1 or for one
    subject in a class, the bounds are those of Newcombe (2006, method 5), which solve |A - a| = z sqrt(V(a)) with the
    variance V of Hanley and McNeil (1982).

    Args:
        scores: Higher for the positive class, (N,); of several classes, each against the rest, (N, K): the figure is
            then their mean.
        is_positive: The right answers, of the same shape.
        subjects: Subject of each row, (N,).

    Returns:
        The figure; all NaN without rows of both classes, the bounds NaN with fewer than 2 subjects. Columns with one
        class are left out of the mean.
    """
    scores, is_positive = np.atleast_2d(scores.T).T, np.atleast_2d(is_positive.T).T  # (N,) is one column
    names, positions = np.unique(np.asarray(subjects), return_inverse=True)
    columns = [k for k in range(scores.shape[1]) if 0 < is_positive[:, k].sum() < len(scores)]
    if not columns:
        return Figure(*[float("nan")] * 3)
    parts = [_Part(scores[:, k], is_positive[:, k], positions=positions, num_subjects=len(names)) for k in columns]
    value = float(np.mean([part.value for part in parts]))
    if len(names) < 2:
        return Figure(value, float("nan"), float("nan"))
    positives, negatives, cross = (
        np.mean([getattr(part, name) for part in parts], axis=0) for name in ("positives", "negatives", "both")
    )
    variance = float(np.sum(positives**2) + np.sum(negatives**2) + np.sum(cross[0] * cross[1]) * 2)
    # Also with too few subjects in a class for a variance.
    if not variance > 1e-12 or not 0 < value < 1:
        bounds = np.mean([_newcombe(part.value, *part.num_subjects) for part in parts], axis=0)
        return Figure(value, float(bounds[0]), float(bounds[1]))
    half = _z() * np.sqrt(variance) / (value * (1 - value))
    centre = np.log(value / (1 - value))
    lower, upper = 1 / (1 + np.exp(-(centre + np.array([-half, half]))))
    return Figure(value, float(lower), float(upper))


class _Part:
    """The AUROC of one class against the rest, and what each subject adds to it.

    Attributes:
        value: The AUROC.
        num_subjects: Subjects with positive rows, and with negative ones.
        positives: Deviations from the AUROC by subject, of its positive rows, with the factor of their variance.
        negatives: The same of its negative rows.
        both: Both, (2, subjects), with the factor of their covariance.
    """

    def __init__(self, scores: Scores, is_positive: Classes, *, positions: NDArray[np.intp], num_subjects: int) -> None:
        from scipy.stats import rankdata  # late: takes most of a second

        num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
        # The share of the other class that is on the right side of a row; ties count half.
        ranks = rankdata(scores)
        wins = np.empty(len(scores))
        wins[is_positive] = (ranks[is_positive] - rankdata(scores[is_positive])) / num_negative
        wins[~is_positive] = 1 - (ranks[~is_positive] - rankdata(scores[~is_positive])) / num_positive
        self.value = float(wins[is_positive].mean())
        away = wins - self.value
        sums = [
            np.bincount(positions[rows], weights=away[rows], minlength=num_subjects) / rows.sum()
            for rows in (is_positive, ~is_positive)
        ]
        self.num_subjects = tuple(len(np.unique(positions[rows])) for rows in (is_positive, ~is_positive))
        self.positives, self.negatives = (
            part * np.sqrt(_correction(count)) for part, count in zip(sums, self.num_subjects, strict=True)
        )
        self.both = np.stack(sums) * np.sqrt(_correction(num_subjects))


def _correction(count: int) -> float:
    return count / (count - 1) if count > 1 else float("nan")


def _newcombe(value: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Newcombe (2006), method 5: the range of areas whose score test does not reject the value."""
    areas = np.linspace(0, 1, 10_001)
    extra = (num_positive + num_negative) / 2 - 1
    shape = (1 - areas) / (2 - areas) + areas / (1 + areas)
    variance = areas * (1 - areas) / (num_positive * num_negative) * (1 + extra * shape)
    kept = areas[np.abs(areas - value) <= _z() * np.sqrt(variance) + 1e-9]
    return min(float(kept.min()), value), max(float(kept.max()), value)


def _z() -> float:
    from scipy.special import ndtri  # late: takes a fraction of a second

    return float(ndtri((1 + LEVEL) / 2))


def auroc_statistic(scores: Scores, is_positive: Classes) -> Statistic:
    """The AUROC of weighted rows; of scores (N, K), the mean over the classes that have positive and negative rows."""
    scores, is_positive = np.atleast_2d(scores.T).T, np.atleast_2d(is_positive.T).T  # (N,) is one column
    orders = [np.argsort(column, kind="stable") for column in scores.T]
    starts = [
        np.flatnonzero(np.r_[True, np.diff(column[order]) > 0]) for column, order in zip(scores.T, orders, strict=True)
    ]

    def auroc(weights: Weights) -> NDArray[np.float64]:
        total = np.zeros(len(weights))
        count = np.zeros(len(weights))
        for order, groups, is_one in zip(orders, starts, is_positive.T, strict=True):
            ordered = weights[:, order]
            positive = np.add.reduceat(ordered * is_one[order], groups, axis=1)
            negative = np.add.reduceat(ordered * ~is_one[order], groups, axis=1)
            wins = positive * (np.cumsum(negative, axis=1) - negative / 2)
            area = wins.sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
            total += np.nan_to_num(area)
            count += np.isfinite(area)
        return total / count

    return auroc
