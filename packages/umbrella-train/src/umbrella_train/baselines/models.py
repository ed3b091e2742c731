"""Linear models with a penalty chosen on the training subjects, and the constant answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(10.0**power for power in range(-2, 7))
"""Weights of the squared coefficients, of standardised features."""
_NUM_FOLDS = 5
_MAX_WORDS = 5000
_MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Targets:
    """The right answers of N training rows of one question.

    Attributes:
        values: (N,): texts of the chosen options, or float64 numbers.
        subjects: Subject of each row, (N,).
        is_choice: Whether they are options.
    """

    values: np.ndarray
    subjects: np.ndarray
    is_choice: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """The options that occur, sorted; empty for numbers."""
        return tuple(sorted(set(self.values.tolist()))) if self.is_choice else ()

    @property
    def is_constant(self) -> bool:
        """Whether all answers are the same, so that there is nothing to learn."""
        return len(set(self.values.tolist())) < 2


def predict_constant(targets: Targets, *, num_rows: int) -> np.ndarray:
    """The frequencies of the classes in the training rows (num_rows, K), or the median of the numbers (num_rows,)."""
    if not targets.is_choice:
        return np.full(num_rows, np.median(targets.values))
    frequencies = [float(np.mean(targets.values == each)) for each in targets.classes]
    return np.tile(frequencies, (num_rows, 1))


def predict_linear(train: np.ndarray, test: np.ndarray, targets: Targets) -> np.ndarray:
    """Logistic regression for options, ridge regression for numbers.

    Args:
        train: Features of the training rows, (N, F).
        test: Features of the test rows, (M, F).
        targets: Answers of the training rows; not all the same.

    Returns:
        Probabilities of the classes (M, K), or numbers (M,).
    """
    model = _build(targets, choose_penalty(train, targets)).fit(train, targets.values)
    return _predict(model, test, targets)


def choose_penalty(features: np.ndarray, targets: Targets) -> float:
    """The penalty with the least error on left-out subjects; of equal ones, and with one subject, the greatest.

    The error is the mean absolute one of numbers, and the log loss of options.
    """
    num_folds = min(_NUM_FOLDS, len(set(targets.subjects.tolist())))
    if num_folds < 2:
        return PENALTIES[-1]
    folds = list(GroupKFold(num_folds).split(features, groups=targets.subjects))
    losses = {penalty: sum(_loss(features, targets, penalty, *fold) for fold in folds) for penalty in PENALTIES}
    return min(reversed(PENALTIES), key=losses.__getitem__)


def bag_of_words(train: Sequence[str], test: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the words of the training texts (the 5,000 most frequent): (N, F) and (M, F) float64."""
    # One-letter words and signs count too: `\\w\\w+`, the default, finds none in some texts.
    vectorizer = CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", max_features=_MAX_WORDS)
    if not any(text.strip() for text in train):
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    counts = vectorizer.fit_transform(train).toarray()
    return counts.astype(np.float64), vectorizer.transform(test).toarray().astype(np.float64)


def _loss(features: np.ndarray, targets: Targets, penalty: float, train: np.ndarray, test: np.ndarray) -> float:
    """Sum of the errors of a fold's test rows; 0 for a fold whose training rows have one class."""
    values = targets.values
    if targets.is_choice and len(set(values[train].tolist())) < 2:
        return 0.0
    predicted = _predict(_build(targets, penalty).fit(features[train], values[train]), features[test], targets)
    if not targets.is_choice:
        return float(np.abs(predicted - values[test]).sum())
    own = predicted[np.arange(len(test)), np.searchsorted(targets.classes, values[test])]
    return -float(np.log(np.maximum(own, _MIN_PROBABILITY)).sum())


def _build(targets: Targets, penalty: float) -> Any:
    model = LogisticRegression(C=1 / penalty, max_iter=2000) if targets.is_choice else Ridge(alpha=penalty)
    return make_pipeline(StandardScaler(), model)


def _predict(model: Any, features: np.ndarray, targets: Targets) -> np.ndarray:
    if not targets.is_choice:
        return np.asarray(model.predict(features), dtype=np.float64)
    # A class that is in no training row of a fold has probability 0.
    probabilities = np.zeros((len(features), len(targets.classes)))
    probabilities[:, np.searchsorted(targets.classes, model.classes_)] = model.predict_proba(features)
    return probabilities
