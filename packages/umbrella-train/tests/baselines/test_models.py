"""Linear models: penalties are chosen on whole subjects, classes that a fold lacks are no error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from umbrella_train.baselines import models
from umbrella_train.baselines.models import (
    PENALTIES,
    Targets,
    bag_of_words,
    choose_penalty,
    predict_constant,
    predict_linear,
)


def targets(values: list[str] | np.ndarray, subjects: list[int] | None = None) -> Targets:
    array = np.array(values)
    return Targets(array, np.array(subjects or list(range(len(array)))), array.dtype.kind == "U")


def test_constant_is_the_median_or_the_frequencies_of_training() -> None:
    assert predict_constant(targets(np.array([1.0, 2.0, 9.0])), num_rows=2).tolist() == [2.0, 2.0]
    frequencies = predict_constant(targets(["b", "a", "b", "b"]), num_rows=2)
    assert frequencies.tolist() == [[0.25, 0.75]] * 2


def test_models_are_those_of_scikit_learn_on_standardised_features() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 5, (30, 4)), rng.normal(3, 5, (7, 4))
    scaler = StandardScaler().fit(train)
    numbers = targets(train @ [1.0, -2.0, 0.0, 0.5] + rng.normal(size=30))
    ridge = Ridge(alpha=choose_penalty(train, numbers)).fit(scaler.transform(train), numbers.values)
    np.testing.assert_allclose(predict_linear(train, test, numbers), ridge.predict(scaler.transform(test)))
    words = targets(["yes" if value > 0 else "no" for value in numbers.values])
    logistic = LogisticRegression(C=1 / choose_penalty(train, words), max_iter=2000)
    logistic.fit(scaler.transform(train), words.values)
    found = predict_linear(train, test, words)
    np.testing.assert_allclose(found, logistic.predict_proba(scaler.transform(test)))
    assert words.classes == ("no", "yes")


def test_penalty_has_the_least_error_on_left_out_subjects() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(24, 3))
    own = targets(features[:, 0] + rng.normal(size=24), [row // 2 for row in range(24)])
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for train, test in GroupKFold(5).split(features, groups=own.subjects):
            scaler = StandardScaler().fit(features[train])
            model = Ridge(alpha=penalty).fit(scaler.transform(features[train]), own.values[train])
            error += np.abs(model.predict(scaler.transform(features[test])) - own.values[test]).sum()
        errors.append(error)
    assert choose_penalty(features, own) == PENALTIES[int(np.argmin(errors))]


def test_rows_of_a_subject_are_in_one_inner_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that identify a subject predict nothing about others, though they predict its other rows exactly."""
    subjects = [row // 4 for row in range(48)]
    values = np.random.default_rng(2).normal(size=12)[subjects]
    features = np.random.default_rng(3).normal(size=(12, 30))[subjects]
    assert choose_penalty(features, targets(values, subjects)) > choose_penalty(features, targets(values)) * 100
    folds = []
    split = GroupKFold.split
    monkeypatch.setattr(
        GroupKFold,
        "split",
        lambda self, *data, **more: [folds.append(fold) or fold for fold in split(self, *data, **more)],
    )
    choose_penalty(features, targets(values, subjects))
    assert len(folds) == 5
    for train, test in folds:
        assert not {subjects[row] for row in train} & {subjects[row] for row in test}


@pytest.mark.parametrize(
    ("words", "subjects"),
    [
        (["a"] * 5 + ["b"], None),  # the fold without b has one class
        (["a", "a", "b", "b", "c", "c"], [0, 0, 1, 1, 2, 2]),  # each fold has a class that its training rows lack
        (["a", "b", "a", "b"], [0, 0, 0, 0]),  # no folds
        (["a", "a", "b", "b"], [0, 0, 1, 1]),  # each fold has one class
    ],
)
def test_few_subjects_or_rare_options_are_no_error(words: list[str], subjects: list[int] | None) -> None:
    features = np.random.default_rng(0).normal(size=(len(words), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predict_linear(features, features[:2], targets(words, subjects))
    assert found.shape == (2, len(set(words)))
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_equal_errors_choose_the_greatest_penalty() -> None:
    features = np.zeros((6, 2))
    assert choose_penalty(features, targets(np.arange(6.0))) == PENALTIES[-1]
    assert choose_penalty(features, targets(np.arange(6.0), [0] * 6)) == PENALTIES[-1]


def test_words_are_counted_and_unknown_ones_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = bag_of_words(["A b b?", "c ?"], ["b d", "?"])
    assert train.tolist() == [[1, 1, 2, 0], [1, 0, 0, 1]]  # ? a b c
    assert test.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    monkeypatch.setattr(models, "_MAX_WORDS", 1)
    assert bag_of_words(["b b c", "c b"], ["c b"])[1].tolist() == [[1]]


def test_empty_texts_have_no_words() -> None:
    train, test = bag_of_words(["", " "], [""])
    assert train.tolist() == [[0], [0]]
    assert test.tolist() == [[0]]
