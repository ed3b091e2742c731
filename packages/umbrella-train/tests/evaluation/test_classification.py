"""Figures of questions with options, against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from umbrella_train.evaluation import classification
from umbrella_train.evaluation.classification import (
    classification_figures,
    confusion_matrix,
    fit_temperature,
    reliability_curve,
)

LABELS = {"auroc", "balanced_accuracy", "f1", "sensitivity", "specificity", "brier", "calibration_error"}


def names(count: int) -> list[str]:
    return [f"sub-{number:04}" for number in range(count)]


def random_case(seed: int, *, num_options: int, num_rows: int = 50) -> tuple[list[str], np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    options = [f"option {number}" for number in range(num_options)]
    right = np.r_[np.arange(num_options), rng.integers(num_options, size=num_rows - num_options)]
    logits = rng.normal(size=(num_rows, num_options)) + np.eye(num_options)[right]
    return [options[k] for k in right], softmax(logits, axis=1), options


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_two_options_equal_scikit_learn(seed: int) -> None:
    answers, probabilities, options = random_case(seed, num_options=2)
    figures = classification_figures(answers, probabilities, options=options, subjects=names(50), seed=0)
    right, chosen = np.array(answers) == options[1], probabilities.argmax(axis=1) == 1
    assert {label: figure.value for label, figure in figures.items()} == pytest.approx(
        {
            "auroc": sk.roc_auc_score(right, probabilities[:, 1]),
            "balanced_accuracy": sk.balanced_accuracy_score(right, chosen),
            "f1": sk.f1_score(right, chosen),
            "sensitivity": sk.recall_score(right, chosen),
            "specificity": sk.recall_score(~right, ~chosen),
            "brier": sk.brier_score_loss(right, probabilities[:, 1]),
            "calibration_error": plain_calibration_error(right == chosen, probabilities.max(axis=1)),
        }
    )
    assert all(figure.lower <= figure.value <= figure.upper for figure in figures.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_options", [3, 6])
def test_figures_of_more_options_equal_scikit_learn(seed: int, num_options: int) -> None:
    answers, probabilities, options = random_case(seed, num_options=num_options)
    figures = classification_figures(answers, probabilities, options=options, subjects=names(50), seed=0)
    chosen = [options[k] for k in probabilities.argmax(axis=1)]
    counts = sk.multilabel_confusion_matrix(answers, chosen, labels=options)
    assert {label: figure.value for label, figure in figures.items()} == pytest.approx(
        {
            "auroc": sk.roc_auc_score(answers, probabilities, multi_class="ovr", average="macro"),
            "balanced_accuracy": sk.balanced_accuracy_score(answers, chosen),
            "f1": sk.f1_score(answers, chosen, average="macro"),
            "sensitivity": sk.recall_score(answers, chosen, average="macro"),
            "specificity": np.mean(counts[:, 0, 0] / counts[:, 0].sum(axis=1)),
            "brier": sk.brier_score_loss(answers, probabilities, labels=options),
            "calibration_error": plain_calibration_error(np.array(answers) == chosen, probabilities.max(axis=1)),
        }
    )


def plain_calibration_error(is_right: np.ndarray, confidence: np.ndarray) -> float:
    total = 0.0
    for number in range(10):
        rows = (confidence > number / 10) & (confidence <= (number + 1) / 10)
        if rows.any():
            total += rows.mean() * abs(is_right[rows].mean() - confidence[rows].mean())
    return total


def test_figures_of_a_class_without_rows_leave_it_out() -> None:
    options, answers = ["a", "b", "c"], ["a", "b"] * 15
    probabilities = np.random.default_rng(0).dirichlet([2, 2, 1], size=30)
    figures = classification_figures(answers, probabilities, options=options, subjects=names(30), seed=0)
    chosen = [options[k] for k in probabilities.argmax(axis=1)]
    assert "c" in chosen
    counts = sk.multilabel_confusion_matrix(answers, chosen, labels=["a", "b"])
    assert figures["specificity"].value == pytest.approx(np.mean(counts[:, 0, 0] / counts[:, 0].sum(axis=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's about the class without rows
        assert figures["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(answers, chosen))
        assert figures["sensitivity"].value == figures["balanced_accuracy"].value
        assert figures["f1"].value == pytest.approx(sk.f1_score(answers, chosen, average="macro"))


def test_equal_probabilities_are_decided_for_the_first_option() -> None:
    assert confusion_matrix(["a", "b"], np.full((2, 2), 0.5), options=["a", "b"]).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3])
@pytest.mark.parametrize("answer", ["a", "b"])
def test_figures_of_one_class_and_few_rows_are_absent_without_warnings(num_rows: int, answer: str) -> None:
    probabilities = np.tile([0.3, 0.7], (num_rows, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_figures(
            [answer] * num_rows, probabilities, options=["a", "b"], subjects=names(num_rows), seed=0
        )
    if not num_rows:
        assert figures == {}
        return
    own = {"specificity"} if answer == "a" else {"sensitivity", "f1"}
    assert figures.keys() == {"brier", "calibration_error", *own}
    assert figures["brier"].value == pytest.approx(0.49 if answer == "a" else 0.09)


@pytest.mark.parametrize("num_options", [2, 3])
def test_perfect_answers_have_an_interval(num_options: int) -> None:
    right = np.arange(30) % num_options
    options = ["a", "b", "c"][:num_options]
    answers = [options[k] for k in right]
    figures = classification_figures(answers, np.eye(num_options)[right], options=options, subjects=names(30), seed=0)
    assert figures.keys() == LABELS
    for label in LABELS - {"brier", "calibration_error"}:
        assert figures[label].value == figures[label].upper == 1
        assert 0.6 < figures[label].lower < 0.95


def test_several_rows_of_a_subject_widen_every_interval() -> None:
    answers, probabilities, options = random_case(0, num_options=2, num_rows=60)
    rows = np.repeat(np.arange(60), 6)
    many = [answers[row] for row in rows]
    by_subject, independent = (
        classification_figures(many, probabilities[rows], options=options, subjects=subjects, seed=0)
        for subjects in (np.repeat(names(60), 6).tolist(), names(360))
    )
    for label in LABELS:
        assert by_subject[label].upper - by_subject[label].lower > 1.4 * (
            independent[label].upper - independent[label].lower
        ), label


def test_f1_interval_of_two_options_is_that_of_its_proportion() -> None:
    # 12 right positives among 20 rows that are positive or called so: J = 0.6, F1 = 1.2 / 1.6.
    answers = ["b"] * 16 + ["a"] * 14
    chosen = [1] * 12 + [0] * 4 + [1] * 4 + [0] * 10
    figures = classification_figures(answers, np.eye(2)[chosen], options=["a", "b"], subjects=names(30), seed=0)
    lower, upper = classification.wilson_figure(0.6, count=20).lower, classification.wilson_figure(0.6, count=20).upper
    assert figures["f1"].value == pytest.approx(0.75)
    assert (figures["f1"].lower, figures["f1"].upper) == pytest.approx(
        (2 * lower / (1 + lower), 2 * upper / (1 + upper))
    )


@pytest.mark.parametrize(
    ("answers", "probabilities", "num_subjects"),
    [
        (["a", "x"], np.full((2, 2), 0.5), 2),
        (["a", "b"], np.full((2, 3), 0.5), 2),
        (["a", "b"], np.array([[0.5, 0.5], [np.nan, 0.5]]), 2),
        (["a", "b"], np.full((2, 2), 0.5), 3),
    ],
)
def test_figures_of_other_inputs_are_rejected(answers: list[str], probabilities: np.ndarray, num_subjects: int) -> None:
    with pytest.raises(ValueError, match=r"options|probabilities|subjects"):
        classification_figures(answers, probabilities, options=["a", "b"], subjects=names(num_subjects), seed=0)


def test_reliability_curve_and_confusion_matrix() -> None:
    answers = ["a", "a", "b", "b", "b"]
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.35, 0.65], [0.1, 0.9], [0.55, 0.45]])
    points = reliability_curve(answers, probabilities, options=["a", "b"])
    assert [(point.probability, point.accuracy, point.count) for point in points] == [
        (pytest.approx(0.575), 0.0, 2),
        (pytest.approx(0.65), 1.0, 1),
        (pytest.approx(0.9), 1.0, 2),
    ]
    expected = sk.confusion_matrix(answers, ["a", "b", "b", "b", "a"], labels=["a", "b"])
    assert (confusion_matrix(answers, probabilities, options=["a", "b"]) == expected).all()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_fit_temperature_finds_the_temperature_of_the_scores(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5000, 3)) * 2
    right = np.array([rng.choice(3, p=row) for row in softmax(logits, axis=1)])
    assert fit_temperature(log_softmax(logits, axis=1) * temperature, right) == pytest.approx(temperature, rel=0.06)


def test_fit_temperature_without_information() -> None:
    assert fit_temperature(np.zeros((4, 2)), np.array([0, 1, 0, 1])) == 1
    separable = fit_temperature(np.array([[0.0, -5.0], [-5.0, 0.0]]), np.array([0, 1]))
    assert 0.01 <= separable < 1
    reversed_scores = fit_temperature(np.array([[0.0, -5.0], [-5.0, 0.0]]), np.array([1, 0]))
    assert reversed_scores == pytest.approx(100, rel=0.01)
    for scores in (np.zeros((0, 2)), np.array([[0.0, -np.inf]])):
        with pytest.raises(ValueError, match="finite"):
            fit_temperature(scores, np.zeros(len(scores), dtype=int))
