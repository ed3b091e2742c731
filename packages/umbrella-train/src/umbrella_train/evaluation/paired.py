"""Differences between two models on the same subjects, with intervals and permutation p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella_data.manifest.answers import read_number
from umbrella_train.evaluation.auroc import auroc_statistic
from umbrella_train.evaluation.intervals import (
    CHUNK_VALUES,
    Figure,
    Statistic,
    Weights,
    bca_interval,
    evaluate,
    mean_statistic,
)
from umbrella_train.evaluation.regression import regression_statistics
from umbrella_train.evaluation.text_scores import TextScore, exact_match, token_f1

NUM_PERMUTATIONS = 10_000

Row = Mapping[str, Any]
"""A row of predictions.jsonl."""
Pair = tuple[Row, Row]
"""The rows of two models about one question."""


@dataclass(frozen=True)
class Difference:
    """A figure of two models on the same rows.

    Attributes:
        values: The figure of the first and of the second model.
        figure: The first one's minus the second one's, with its 95 % interval (BCa over subjects).
        p: Two-sided p-value of a permutation test.
    """

    values: tuple[float, float]
    figure: Figure
    p: float


def paired_differences(pairs: Sequence[Pair], *, subjects: Sequence[str], seed: int) -> dict[str, Difference]:
    """Differences of the main figures of one task.

    - `choice`: `accuracy`; `auroc` and `brier` if all rows have scores of the same options. The AUROC compares ranks
      within each model, so that a permutation does not mix two scales (Venkatraman and Begg 1996).
    - `number`: `error` (mean absolute error) and `r2`, of pairs that both models answered with a number.
    - `text`: `exact_match` and `token_f1`.

    Args:
        pairs: Rows of the two models, all of one type, with the same right answers.
        subjects: Subject of each pair.
        seed: Seed of resamples and permutations.

    Returns:
        Differences by label. Undefined ones, as of an AUROC with one class, are absent.
    """
    # Both models' rows, the first one's before the second one's.
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    kind = rows[0]["type"] if rows else "choice"
    if kind == "number":
        statistics = _number_statistics(rows)
    elif kind == "text":
        statistics = {"exact_match": _text_statistic(rows, exact_match), "token_f1": _text_statistic(rows, token_f1)}
    else:
        statistics = {"accuracy": mean_statistic(_column(rows, "score")), **_probability_statistics(rows)}
    differences = {
        label: paired_difference(statistic, subjects=subjects, seed=seed) for label, statistic in statistics.items()
    }
    return {label: difference for label, difference in differences.items() if np.isfinite(difference.figure.value)}


def paired_difference(statistic: Statistic, *, subjects: Sequence[str], seed: int) -> Difference:
    """The difference of one figure.

    Args:
        statistic: Of 2 N rows: those of the first model, then those of the second.
        subjects: Subject of each pair, (N,).
        seed: Seed of resamples and permutations.
    """

    def difference(weights: Weights) -> NDArray[np.float64]:
        nothing = np.zeros_like(weights)
        return statistic(np.hstack([weights, nothing])) - statistic(np.hstack([nothing, weights]))

    num_pairs = len(subjects)
    ones, zeros = np.ones((1, num_pairs)), np.zeros((1, num_pairs))
    first, second = evaluate(statistic, np.block([[ones, zeros], [zeros, ones]])) if num_pairs else (np.nan, np.nan)
    figure = bca_interval(difference, subjects=subjects, seed=seed)
    return Difference((float(first), float(second)), figure, _permutation_p(statistic, subjects=subjects, seed=seed))


def _permutation_p(statistic: Statistic, *, subjects: Sequence[str], seed: int) -> float:
    """Two-sided p-value: the two models' rows are exchanged for random subjects, or for all sets of few subjects.

    It is (b + 1) / (m + 1), with b of m exchanges that have at least the observed difference (Phipson and Smyth 2010).
    """
    _, positions = np.unique(np.asarray(subjects), return_inverse=True)
    num_pairs, num_subjects = len(positions), int(positions.max(initial=-1)) + 1

    def difference(swaps: NDArray[np.bool_]) -> NDArray[np.float64]:
        swapped = swaps[:, positions].astype(np.float64)
        kept = 1 - swapped
        return evaluate(lambda weights: statistic(weights) - statistic(1 - weights), np.hstack([kept, swapped]))

    observed = float(difference(np.zeros((1, num_subjects), dtype=bool))[0]) if num_pairs else float("nan")
    if not np.isfinite(observed):
        return float("nan")
    if 2**num_subjects <= NUM_PERMUTATIONS:
        # All exchanges but that of nobody, which is the 1 in the formula.
        bits = np.arange(1, 2**num_subjects)[:, None] >> np.arange(num_subjects)
        swaps = (bits & 1).astype(bool)
    else:
        swaps = np.random.default_rng(seed).integers(2, size=(NUM_PERMUTATIONS, num_subjects), dtype=np.bool_)
    size = max(1, CHUNK_VALUES // (2 * num_pairs))
    values = np.concatenate([difference(swaps[start : start + size]) for start in range(0, len(swaps), size)])
    # Equal differences are sums in another order, with other rounding errors.
    count = int(np.sum(np.abs(values) >= abs(observed) * (1 - 1e-9) - 1e-12))
    return (count + 1) / (len(swaps) + 1)


def is_answered(row: Row) -> bool:
    """Whether a row has what its figures need: a number for a question about one."""
    return row["type"] != "number" or (row["score"] is not None and _number(row) is not None)


def _number(row: Row) -> float | None:
    """The predicted number: the expected value, or the one in the text."""
    expected = row.get("expected")
    return read_number(str(row["generated"]), unit=row.get("unit")) if expected is None else float(expected)


def _column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    return np.array([float(row[key] or 0) for row in rows])


def _number_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    predicted = np.array([_number(row) for row in rows], dtype=np.float64)
    r2 = regression_statistics(_column(rows, "answer"), predicted)["r2"]
    return {"error": mean_statistic(_column(rows, "score")), "r2": r2}


def _text_statistic(rows: Sequence[Row], score: TextScore) -> Statistic:
    return mean_statistic(np.array([score(str(row["generated"]), str(row["answer"])) or 0.0 for row in rows]))


def _probability_statistics(rows: Sequence[Row]) -> dict[str, Statistic]:
    """`auroc` and `brier`; nothing unless all rows have scores of the same options."""
    options = tuple(rows[0].get("options") or ()) if rows else ()
    tables = [dict(zip(row.get("options") or (), row.get("option_scores") or (), strict=False)) for row in rows]
    if len(options) < 2 or any(table.keys() != set(options) for table in tables):
        return {}
    from scipy.special import softmax  # late: takes a fraction of a second
    from scipy.stats import rankdata

    scores = np.array([[-np.inf if table[name] is None else table[name] for name in options] for table in tables])
    if not np.isfinite(scores.max(axis=1)).all():
        return {}
    probabilities = softmax(scores, axis=1)
    is_answer = np.array([[row["answer"] == name for name in options] for row in rows])
    halves = 1 + (len(options) == 2)
    brier = ((probabilities - is_answer) ** 2).sum(axis=1) / halves
    # Of two options, the second is the positive class.
    columns = slice(1, 2) if len(options) == 2 else slice(None)
    ranks = np.concatenate([rankdata(half, axis=0) for half in np.split(probabilities[:, columns], 2)])
    return {"auroc": auroc_statistic(ranks, is_answer[:, columns]), "brier": mean_statistic(brier)}
