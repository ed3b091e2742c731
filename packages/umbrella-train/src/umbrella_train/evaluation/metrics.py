"""Metrics of predictions, each with a 95 % interval over subjects, beside its controls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from umbrella_train.evaluation.classification import classification_figures, fit_temperature
from umbrella_train.evaluation.comparison import COMPARED, control_label, num_overlaps
from umbrella_train.evaluation.intervals import (
    Figure,
    bca_interval,
    binomial_interval,
    mean_statistic,
    wilson_figure,
)
from umbrella_train.evaluation.predictions import CONDITIONS, Condition, Prediction
from umbrella_train.evaluation.regression import interval_coverage, regression_figures
from umbrella_train.evaluation.text_scores import TEXT_SCORES, TextScore

# Figures with controls.
_CONTROLLED: Mapping[str, tuple[str, ...]] = {
    "choice": ("auroc",),
    "number": ("error", "r2"),
    "text": ("token_f1", "exact_match"),
}
# Labels that a set of modalities with one task of a type has, too.
_HEADLINES = frozenset(
    {"chance", "majority", "error_constant"}
    | {control_label(figure, condition) for figure in COMPARED for condition in CONDITIONS}
)
# Labels that answers of all types have: with two tasks, they would be of either.
_COMMON = frozenset({"questions", "subjects", "unparsed", "overlaps"})


def summarise(
    predictions: Sequence[Prediction],
    *,
    seed: int = 0,
    temperatures: Mapping[str, float] | None = None,
    texts: Mapping[str, TextScore] = TEXT_SCORES,
) -> dict[str, float]:
    """Metrics of predictions, `eval/LABEL/NAME`, for each task of each set of modalities (`T1/sex`).

    A figure has its 95 % interval over subjects beside it (`LABEL_lower`, `LABEL_upper`), and its controls the name of
    the condition (`auroc_shuffled`).

    - `choice`: `accuracy` of the likeliest option; its controls are `shuffled`, `swapped` and `no_scan`;
      `accuracy_normalised` by the likelihood per token, `accuracy_generated` by the text; `chance`, the accuracy of
      guessing, and `majority`, that of always giving the commonest answer. The figures of `classification_figures` if
      all questions have the same options; with a temperature also `brier_scaled` and `calibration_error_scaled`.
    - `number`: the figures of `regression_figures` of the expected values; `error_generated` of the texts;
      `coverage` of the 80 % interval; `error_constant` and `rmse_constant`, the errors of the best constants.
    - `text`: the scores in `texts`.
    - `unparsed`: the fraction of generated texts that are not readable; `questions` and `subjects`: counts.
    - `overlaps`: the number of controls whose interval overlaps that of the main figure.

    Where all questions about a set of modalities with one type of answer are one task, its main figures are also there
    under the modalities alone (`eval/accuracy/T1`); counts and `overlaps`, where all its questions are one task.

    Args:
        predictions: Predictions of all conditions.
        seed: Seed of the bootstrap.
        temperatures: Temperature of the probabilities by name.
        texts: Scores of texts by label, as from `text_scores`.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    tasks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for prediction in predictions:
        groups[prediction.name].append(prediction)
        tasks[prediction.modality, prediction.type].add(prediction.name)
    metrics: dict[str, float] = {}
    for name, members in sorted(groups.items()):
        counts = _counts(members)
        summaries: dict[str, Callable[[Sequence[Prediction], int], dict[str, float]]] = {
            "choice": _summarise_choices,
            "number": _summarise_numbers,
            "text": partial(_summarise_texts, scores=texts),
        }
        for kind, summary in summaries.items():
            same_kind = [p for p in members if p.type == kind]
            if not any(p.condition == "accuracy" for p in same_kind):
                continue
            found = counts | summary(same_kind, seed)
            if temperatures and name in temperatures:
                found |= _scaled(same_kind, temperature=temperatures[name], seed=seed)
            keyed = {f"eval/{label}/{name}": value for label, value in found.items()}
            if (num := num_overlaps(keyed, name)) is not None:
                found["overlaps"] = keyed[f"eval/overlaps/{name}"] = float(num)
            metrics |= keyed
            modality = same_kind[0].modality
            if len(tasks[modality, kind]) == 1:
                is_only = {key for key in tasks if key[0] == modality} == {(modality, kind)}
                shown = _HEADLINES | _COMMON if is_only else _HEADLINES
                metrics |= {
                    f"eval/{label}/{modality}": value
                    for label, value in found.items()
                    if label.removesuffix("_lower").removesuffix("_upper") in shown
                }
    return metrics


def _counts(predictions: Sequence[Prediction]) -> dict[str, float]:
    own = [p for p in predictions if p.condition == "accuracy"]
    read = [p.is_parsed for p in own if p.is_parsed is not None]
    found = {"questions": float(len(own)), "subjects": float(len({p.subject for p in own}))}
    return found | ({"unparsed": read.count(False) / len(read)} if read else {})


def _summarise_choices(predictions: Sequence[Prediction], seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for condition, members in _by_condition(predictions):
        metrics |= _labelled(
            control_label("accuracy", condition), _proportion([p.score or 0.0 for p in members], members)
        )
        figures = _class_figures(members, seed=seed)
        if condition != "accuracy":
            figures = {key: figure for key, figure in figures.items() if key in _CONTROLLED["choice"]}
        for key, figure in figures.items():
            metrics |= _labelled(control_label(key, condition), figure)
    own = [p for p in predictions if p.condition == "accuracy"]
    for label, hits in (
        ("accuracy_normalised", [_normalised_hit(p) for p in own]),
        ("accuracy_generated", [p.score_generated for p in own]),
    ):
        known = [hit for hit in hits if hit is not None]
        if len(known) == len(own):
            metrics |= _labelled(label, _proportion(known, own))
    chance = fmean(1 / len(p.options) for p in own)
    metrics |= _labelled("chance", Figure(chance, *binomial_interval(chance, count=_num_subjects(own))))
    metrics["majority"] = Counter(p.answer for p in own).most_common(1)[0][1] / len(own)
    return metrics


def class_probabilities(
    members: Sequence[Prediction], *, temperature: float = 1.0
) -> tuple[tuple[str, ...], NDArray[np.float64]] | None:
    """The options (K,) and their probabilities (N, K) under predictions of one task.

    None if the questions have different options, or not all were answered by likelihood, with finite values.
    """
    orders = {p.options for p in members}
    scores = [dict(zip(p.options, p.option_scores, strict=True)) for p in members if p.option_scores is not None]
    if not members or len(scores) < len(members) or len({frozenset(order) for order in orders}) > 1:
        return None
    # The order has a meaning, but not if it is drawn for each question.
    options = members[0].options if len(orders) == 1 else tuple(sorted(members[0].options))
    table = np.array([[row[option] for option in options] for row in scores], dtype=np.float64)
    if not np.isfinite(table).all():
        return None
    from scipy.special import softmax  # late: takes a fraction of a second

    return options, softmax(table / temperature, axis=1)


def fit_temperatures(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The temperature of each task's probabilities, by name, fitted on predictions of subjects that are not tested."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        if prediction.type == "choice" and prediction.condition == "accuracy":
            groups[prediction.name].append(prediction)
    found = {}
    for name, members in groups.items():
        if (known := class_probabilities(members)) is not None:
            options, probabilities = known
            right = np.array([options.index(str(p.answer)) for p in members], dtype=np.intp)
            found[name] = fit_temperature(np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)), right)
    return found


def _class_figures(members: Sequence[Prediction], *, seed: int, temperature: float = 1.0) -> dict[str, Figure]:
    found = class_probabilities(members, temperature=temperature)
    if found is None:
        return {}
    options, probabilities = found
    answers, subjects = [str(p.answer) for p in members], [p.subject for p in members]
    return classification_figures(answers, probabilities, options=options, subjects=subjects, seed=seed)


def _scaled(predictions: Sequence[Prediction], *, temperature: float, seed: int) -> dict[str, float]:
    own = [p for p in predictions if p.condition == "accuracy"]
    figures = _class_figures(own, seed=seed, temperature=temperature)
    metrics = {"temperature": temperature}
    for key in ("brier", "calibration_error"):
        metrics |= _labelled(f"{key}_scaled", figures[key]) if key in figures else {}
    return metrics


def _normalised_hit(prediction: Prediction) -> float | None:
    if prediction.option_scores is None or prediction.option_lengths is None:
        return None
    means = np.divide(prediction.option_scores, prediction.option_lengths)
    return float(prediction.options[int(means.argmax())] == prediction.answer)


def _summarise_numbers(predictions: Sequence[Prediction], seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for condition, members in _by_condition(predictions):
        read = [p for p in members if p.predicted is not None]
        if not read:
            continue
        figures = regression_figures(
            np.array([float(p.answer) for p in read]),
            np.array([float(p.predicted) for p in read if p.predicted is not None]),
            subjects=[p.subject for p in read],
            seed=seed,
        )
        for key, figure in figures.items():
            if condition == "accuracy" or key in _CONTROLLED["number"]:
                metrics |= _labelled(control_label(key, condition), figure)
    own = [p for p in predictions if p.condition == "accuracy"]
    said = [p for p in own if p.score_generated is not None]
    if said:
        errors = [p.score_generated for p in said if p.score_generated is not None]
        metrics |= _labelled("error_generated", _mean(errors, [p.subject for p in said], seed=seed))
    bounded = [(p, p.interval) for p in own if p.interval is not None]
    if bounded:
        lower, upper = np.array([interval for _, interval in bounded]).T
        right = np.array([float(p.answer) for p, _ in bounded])
        subjects = [p.subject for p, _ in bounded]
        metrics |= _labelled("coverage", interval_coverage(right, lower, upper, subjects=subjects))
    answers = [float(p.answer) for p in own]
    middle, mean = median(answers), fmean(answers)
    metrics["error_constant"] = fmean(abs(answer - middle) for answer in answers)
    metrics["rmse_constant"] = float(np.sqrt(fmean((answer - mean) ** 2 for answer in answers)))
    return metrics


def _summarise_texts(
    predictions: Sequence[Prediction], seed: int, *, scores: Mapping[str, TextScore]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for condition, members in _by_condition(predictions):
        for key, score in scores.items():
            if condition != "accuracy" and key not in _CONTROLLED["text"]:
                continue
            scored = [(score(p.generated or "", str(p.answer)), p.subject) for p in members]
            known = [(value, subject) for value, subject in scored if value is not None]
            if known:
                values, subjects = zip(*known, strict=True)
                metrics |= _labelled(control_label(key, condition), _mean_share(values, subjects, seed=seed))
    return metrics


def _by_condition(predictions: Sequence[Prediction]) -> Iterable[tuple[Condition, list[Prediction]]]:
    for condition in CONDITIONS:
        members = [p for p in predictions if p.condition == condition]
        if members:
            yield condition, members


def _proportion(hits: Sequence[float], members: Sequence[Prediction]) -> Figure:
    return wilson_figure(fmean(hits), count=_num_subjects(members))


def _mean(values: Sequence[float], subjects: Sequence[str], *, seed: int) -> Figure:
    return bca_interval(mean_statistic(np.asarray(values)), subjects=subjects, seed=seed)


def _mean_share(values: Sequence[float], subjects: Sequence[str], *, seed: int) -> Figure:
    """The mean of scores from 0 to 1; equal scores have Wilson's interval, since no resample differs."""
    figure = _mean(values, subjects, seed=seed)
    is_equal = figure.lower == figure.upper and 0 <= figure.value <= 1
    return wilson_figure(figure.value, count=len(set(subjects))) if is_equal else figure


def _labelled(label: str, figure: Figure) -> dict[str, float]:
    bounds = {f"{label}_lower": figure.lower, f"{label}_upper": figure.upper}
    # There is no interval of one subject.
    return {label: figure.value} | {key: bound for key, bound in bounds.items() if not np.isnan(bound)}


def _num_subjects(predictions: Sequence[Prediction]) -> int:
    return len({p.subject for p in predictions})
