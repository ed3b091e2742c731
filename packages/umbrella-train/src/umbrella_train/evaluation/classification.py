"""Figures of questions with options: AUROC, balanced accuracy, F1, calibration, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from umbrella_train.evaluation.auroc import delong_interval
from umbrella_train.evaluation.intervals import (
    Figure,
    Statistic,
    Weights,
    bca_interval,
    mean_statistic,
    wilson_figure,
)

NUM_BINS = 10
"""Bins of the calibration error and the reliability curve, of equal width."""
# Twice this far, a model is all but certain, or guesses.
_TEMPERATURES = (0.01, 100.0)

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityPoint:
    """One bin of a reliability curve.

    Attributes:
        probability: Mean probability of the chosen options.
        accuracy: Fraction of them that is right.
        count: Number of rows in the bin.
    """

    probability: float
    accuracy: float
    count: int


def classification_figures(
    answers: Sequence[str],
    probabilities: NDArray[np.float64],
    *,
    options: Sequence[str],
    subjects: Sequence[str],
    seed: int,
) -> dict[str, Figure]:
    """Figures of the probabilities of the options; the decision is the most probable one, the first of equal ones.

    With two options, the second is the positive class. With more, `auroc`, `f1`, `sensitivity` and `specificity` are
    means over the classes, each against the rest. Classes that are the answer of no row are left out; if they are
    predicted, their F1 counts 0, as in scikit-learn.

    - `auroc`: DeLong's interval.
    - `balanced_accuracy`: mean recall of the classes that have rows.
    - `f1`, `sensitivity`, `specificity`: with two options, Wilson's interval; F1 is 2 J / (1 + J), where J is the
      proportion of right positives among all rows but right negatives.
    - `brier`: mean squared error of the probability of the positive class; with more than two options, the sum over the
      options, from 0 to 2.
    - `calibration_error`: expected calibration error of the probability of the decision, in 10 bins of equal width
      (Naeini 2015, Guo 2017). With few rows it is above 0 also for calibrated probabilities.

    Where nothing else is said, intervals are BCa over subjects; if all resamples agree, as in perfect answers, Wilson's
    for as many subjects as the smallest class has.

    Args:
        answers: The right options, (N,).
        probabilities: (N, K), each row with sum 1.
        options: The options in the order of the columns, (K,).
        subjects: Subject of each row, (N,).
        seed: Seed of the resamples.

    Returns:
        Figures by label. Undefined ones, as an AUROC with one class, are absent.

    Raises:
        ValueError: For an answer that is none of the options, probabilities of another shape or not finite, or another
            number of subjects.
    """
    table = _Table(answers, probabilities, options)
    if len(subjects) != len(table.right):
        raise ValueError(f"there are {len(table.right)} answers of {len(subjects)} subjects; each needs its subject")
    if not len(table.right):
        return {}
    is_binary = len(options) == 2
    positive = table.is_answer[:, 1:2] if is_binary else table.is_answer
    chances = probabilities[:, 1:2] if is_binary else probabilities
    figures = {"auroc": delong_interval(chances, positive, subjects=subjects)}
    smallest = min(_num_subjects(subjects, rows) for rows in table.is_answer.T if rows.any())
    for label, function in (
        ("balanced_accuracy", _balanced_accuracy),
        *(() if is_binary else (("f1", _macro_f1), ("sensitivity", _macro_recall), ("specificity", _specificity))),
    ):
        figure = bca_interval(table.statistic(function), subjects=subjects, seed=seed)
        if figure.lower == figure.upper:
            figure = wilson_figure(figure.value, count=smallest)
        figures[label] = figure
    if is_binary:
        figures |= _binary_proportions(table, subjects)
    for label, statistic in (("brier", mean_statistic(table.brier)), ("calibration_error", table.calibration_error)):
        figures[label] = bca_interval(statistic, subjects=subjects, seed=seed)
    return {label: figure for label, figure in figures.items() if np.isfinite(figure.value)}


class _Table:
    """Answers as numbers.

    Attributes:
        right: Index of the right option, (N,).
        chosen: Index of the decision, (N,).
        is_answer: (N, K).
        is_chosen: (N, K).
        confidence: Probability of the decision, (N,).
        brier: Squared error of each row, (N,).
    """

    def __init__(self, answers: Sequence[str], probabilities: NDArray[np.float64], options: Sequence[str]) -> None:
        shape = (len(answers), len(options))
        if probabilities.shape != shape or not np.isfinite(probabilities).all():
            raise ValueError(
                f"probabilities have the shape {probabilities.shape}; they must be finite and of shape {shape}"
            )
        if unknown := sorted({str(answer) for answer in answers} - set(options)):
            raise ValueError(f"answers {', '.join(unknown)} are none of the options {', '.join(options)}")
        self.right = np.array([list(options).index(answer) for answer in answers], dtype=np.intp)
        self.chosen = probabilities.argmax(axis=1) if len(answers) else self.right
        self.is_answer = self.right[:, None] == np.arange(len(options))
        self.is_chosen = self.chosen[:, None] == np.arange(len(options))
        self.confidence = probabilities.max(axis=1, initial=0)
        # As brier_score_loss of scikit-learn: of two options, one is counted.
        self.brier = ((probabilities - self.is_answer) ** 2).sum(axis=1) / (2 if len(options) == 2 else 1)

    def statistic(self, function: Callable[[Counts, Counts, Counts, Counts], Counts]) -> Statistic:
        """A function of four counts by class, (R, K): right decisions, answers, decisions, and all rows, (R, 1)."""
        columns = np.hstack([self.is_answer & self.is_chosen, self.is_answer, self.is_chosen]).astype(np.float64)

        def counted(weights: Weights) -> Counts:
            hits, answers, decisions = np.split(weights @ columns, 3, axis=1)
            return function(hits, answers, decisions, weights.sum(axis=1, keepdims=True))

        return counted

    def calibration_error(self, weights: Weights) -> Counts:
        """Weighted mean over the bins of the distance between accuracy and probability, (R,)."""
        gaps = (self.right == self.chosen) - self.confidence
        in_bin = bins_of(self.confidence)[:, None] == np.arange(NUM_BINS)
        distances: Counts = np.abs(weights @ (gaps[:, None] * in_bin)).sum(axis=1)
        return distances / weights.sum(axis=1)


def bins_of(confidence: NDArray[np.float64]) -> NDArray[np.intp]:
    """The bin of each probability: the first is 0 to 0.1, with its upper end, and so on."""
    return np.clip(np.ceil(confidence * NUM_BINS - 1e-9).astype(np.intp) - 1, 0, NUM_BINS - 1)


def _num_subjects(subjects: Sequence[str], rows: NDArray[np.bool_]) -> int:
    return len({subjects[row] for row in np.flatnonzero(rows).tolist()})


def _mean_over(values: Counts) -> Counts:
    """Mean over the classes with a value, (R,)."""
    is_defined = np.isfinite(values)
    mean: Counts = np.where(is_defined, values, 0).sum(axis=1) / is_defined.sum(axis=1)
    return mean


def _balanced_accuracy(hits: Counts, answers: Counts, decisions: Counts, total: Counts) -> Counts:
    recall = _macro_recall(hits, answers, decisions, total)
    return np.where((answers > 0).sum(axis=1) > 1, recall, np.nan)


def _macro_recall(hits: Counts, answers: Counts, _: Counts, __: Counts) -> Counts:
    return _mean_over(hits / answers)


def _specificity(hits: Counts, answers: Counts, decisions: Counts, total: Counts) -> Counts:
    others = np.where(answers > 0, total - answers, np.nan)
    return _mean_over(1 - (decisions - hits) / others)


def _macro_f1(hits: Counts, answers: Counts, decisions: Counts, _: Counts) -> Counts:
    return _mean_over(2 * hits / (answers + decisions))


def _binary_proportions(table: _Table, subjects: Sequence[str]) -> dict[str, Figure]:
    """Sensitivity, specificity and F1 with Wilson's interval; those without rows are absent."""
    is_right, positive, chosen = table.right == table.chosen, table.right == 1, table.chosen == 1
    found = {}
    parts = {"sensitivity": positive, "specificity": ~positive, "f1": positive | chosen if positive.any() else positive}
    for label, rows in parts.items():
        if rows.any():
            value = float(is_right[rows].mean())
            found[label] = wilson_figure(value, count=_num_subjects(subjects, rows))
    if "f1" in found:
        share = found["f1"]
        found["f1"] = Figure(*(2 * part / (1 + part) for part in (share.value, share.lower, share.upper)))
    return found


def reliability_curve(
    answers: Sequence[str], probabilities: NDArray[np.float64], *, options: Sequence[str]
) -> list[ReliabilityPoint]:
    """Accuracy against the probability of the decision, for each of the 10 bins of `calibration_error` with rows.

    Arguments and errors are those of `classification_figures`.
    """
    table = _Table(answers, probabilities, options)
    bins = bins_of(table.confidence)
    is_right = table.right == table.chosen
    return [
        ReliabilityPoint(float(table.confidence[rows].mean()), float(is_right[rows].mean()), int(rows.sum()))
        for rows in (bins == number for number in np.unique(bins))
    ]


def confusion_matrix(
    answers: Sequence[str], probabilities: NDArray[np.float64], *, options: Sequence[str]
) -> NDArray[np.int64]:
    """Number of rows by right option (first axis) and decision (second axis), (K, K).

    Arguments and errors are those of `classification_figures`.
    """
    table = _Table(answers, probabilities, options)
    counts = np.zeros((len(options), len(options)), dtype=np.int64)
    np.add.at(counts, (table.right, table.chosen), 1)
    return counts


def fit_temperature(log_scores: NDArray[np.float64], answers_index: NDArray[np.intp]) -> float:
    """The temperature that calibrates `softmax(log_scores / temperature)` (Guo 2017): it minimises the mean loss.

    Args:
        log_scores: Natural logarithm of each option's score, (N, K).
        answers_index: Column of the right option, (N,).

    Returns:
        Between 0.01 and 100; 1 if no temperature is better, as for equal scores.

    Raises:
        ValueError: Without rows, or for scores that are not finite.
    """
    from scipy.optimize import minimize_scalar  # late: takes a fraction of a second
    from scipy.special import logsumexp

    if not len(log_scores) or not np.isfinite(log_scores).all():
        raise ValueError(f"log_scores have the shape {log_scores.shape}; a temperature needs rows of finite values")
    own = log_scores[np.arange(len(log_scores)), answers_index]

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(logsumexp(log_scores * inverse, axis=1) - own * inverse))

    # The loss has one minimum: it is convex in the inverse of the temperature.
    best = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x)) if best.fun < loss(0.0) - 1e-12 else 1.0
