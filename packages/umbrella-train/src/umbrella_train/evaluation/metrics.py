"""Scores answers with one function per answer type, and summarises them with intervals over subjects.

To add an answer type, add a row to `SCORERS`, and to `ERROR_TYPES` where its score is an error and not a hit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

from umbrella_data.manifest.answers import normalise, read_choice, read_number, without_reasoning
from umbrella_data.manifest.sample import Answer
from umbrella_train.evaluation.intervals import binomial_interval, bootstrap_interval, wilson_interval

Condition = Literal["accuracy", "shuffled", "swapped", "no_scan"]
CONDITIONS: tuple[Condition, ...] = ("accuracy", "shuffled", "swapped", "no_scan")


@dataclass(frozen=True)
class Score:
    """The score of one answer.

    Attributes:
        value: 1 or 0 for a hit or a miss, the absolute error for a number; None for an unreadable number.
        parsed: What the text was read as: an option, a number, or the text without blanks and punctuation around it;
            None if it is not readable as an answer.
    """

    value: float | None
    parsed: str | float | None

    @property
    def is_parsed(self) -> bool:
        """Whether the text is readable as an answer."""
        return self.parsed is not None


@dataclass(frozen=True)
class Prediction:
    """The answer to one question under one condition: a row of predictions.jsonl.

    Attributes:
        subject: Hash of the subject.
        task: Name of the question.
        modality: The modalities of its scans, joined by `+`; `text` without scans.
        condition: `accuracy` (its own scans), or one of the controls.
        question: Text of the last user turn.
        type: The type of the answer.
        options: The choices.
        answer: The right answer.
        unit: Unit of a number.
        generated: Text that the model generated.
        score: See `Score.value`.
        is_parsed: See `Score.is_parsed`.
        option_scores: Natural logarithm of the probability of each option, in their order.
        expected: The predicted number.
    """

    subject: str
    task: str
    modality: str
    condition: Condition
    question: str
    type: str
    options: tuple[str, ...]
    answer: str | float
    unit: str | None
    generated: str
    score: float | None
    is_parsed: bool
    option_scores: tuple[float, ...] | None = None
    expected: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The row of predictions.jsonl."""
        return asdict(self)


def score_choice(generated: str, answer: Answer) -> Score:
    """1 where the text is the right option, 0 where it is another one or none of them."""
    option = read_choice(generated, answer.options)
    return Score(float(option == answer.value), parsed=option)


def score_number(generated: str, answer: Answer) -> Score:
    """Absolute error of the one number in the text; see `read_number` for texts that cannot be read."""
    number = read_number(generated, unit=answer.unit)
    return Score(None if number is None else abs(number - float(answer.value)), parsed=number)


def score_text(generated: str, answer: Answer) -> Score:
    """1 where the text is the right one, but for case, blanks and punctuation around it."""
    text = normalise(without_reasoning(generated))
    return Score(float(text == normalise(str(answer.value))), parsed=text or None)


SCORERS: Mapping[str, Callable[[str, Answer], Score]] = MappingProxyType(
    {"choice": score_choice, "number": score_number, "text": score_text}
)
ERROR_TYPES = frozenset({"number"})


def score_answer(generated: str, answer: Answer) -> Score:
    """Score a generated text by the type of the right answer."""
    return SCORERS[answer.type](generated, answer)


def summarise(predictions: Sequence[Prediction], *, seed: int = 0) -> dict[str, float]:
    """Metrics of predictions, for each modality (`eval/accuracy/T1`) and each of its tasks (`eval/accuracy/T1/sex`).

    - Hits: `eval/accuracy` and its controls `eval/shuffled`, `eval/swapped` and `eval/no_scan`, each also with `_lower`
      and `_upper` (Wilson, over subjects); `eval/chance`, the accuracy of guessing, with its interval;
      `eval/majority`, the accuracy of always giving the commonest answer.
    - Numbers, by task and not by modality, since units differ: `eval/error` (mean absolute error) and its controls
      `eval/error_shuffled`, ..., with bootstrap intervals; `eval/error_constant`, the error of the best constant guess,
      the median of the right answers.
    - `eval/unparsed`: the fraction of unreadable answers. They count as misses; a mean error excludes them.
    - `eval/questions` and `eval/subjects`: counts.

    Args:
        predictions: Predictions of all conditions.
        seed: Seed of the bootstrap.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        if prediction.type not in ERROR_TYPES:
            groups[prediction.modality].append(prediction)
        groups[f"{prediction.modality}/{prediction.task}"].append(prediction)
    metrics: dict[str, float] = {}
    for name, members in sorted(groups.items()):
        own = [p for p in members if p.condition == "accuracy"]
        if not own:
            continue
        metrics[f"eval/questions/{name}"] = len(own)
        metrics[f"eval/subjects/{name}"] = _num_subjects(own)
        metrics[f"eval/unparsed/{name}"] = sum(not p.is_parsed for p in own) / len(own)
        metrics |= _summarise_hits([p for p in members if p.type not in ERROR_TYPES], name=name)
        metrics |= _summarise_errors([p for p in members if p.type in ERROR_TYPES], name=name, seed=seed)
    return metrics


def _summarise_hits(predictions: Sequence[Prediction], *, name: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for condition, members in _by_condition(predictions):
        accuracy = sum(p.score or 0.0 for p in members) / len(members)
        lower, upper = wilson_interval(accuracy, count=_num_subjects(members))
        metrics |= _with_interval(condition, name=name, value=accuracy, interval=(lower, upper))
    own = [p for p in predictions if p.condition == "accuracy"]
    if own and all(p.options for p in own):
        chance = sum(1 / len(p.options) for p in own) / len(own)
        interval = binomial_interval(chance, count=_num_subjects(own))
        metrics |= _with_interval("chance", name=name, value=chance, interval=interval)
        metrics[f"eval/majority/{name}"] = _majority(own)
    return metrics


def _summarise_errors(predictions: Sequence[Prediction], *, name: str, seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for condition, members in _by_condition(predictions):
        read = [(p.score, p.subject) for p in members if p.score is not None]
        if not read:
            continue
        errors, subjects = [error for error, _ in read], [subject for _, subject in read]
        label = "error" if condition == "accuracy" else f"error_{condition}"
        interval = bootstrap_interval(errors, subjects=subjects, seed=seed)
        metrics |= _with_interval(label, name=name, value=sum(errors) / len(errors), interval=interval)
    answers = [float(p.answer) for p in predictions if p.condition == "accuracy"]
    if answers:
        guess = median(answers)
        metrics[f"eval/error_constant/{name}"] = sum(abs(answer - guess) for answer in answers) / len(answers)
    return metrics


def _by_condition(predictions: Sequence[Prediction]) -> Iterable[tuple[Condition, list[Prediction]]]:
    for condition in CONDITIONS:
        members = [p for p in predictions if p.condition == condition]
        if members:
            yield condition, members


def _with_interval(label: str, *, name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    lower, upper = interval
    return {f"eval/{label}/{name}": value, f"eval/{label}_lower/{name}": lower, f"eval/{label}_upper/{name}": upper}


def _num_subjects(predictions: Sequence[Prediction]) -> int:
    return len({p.subject for p in predictions})


def _majority(predictions: Sequence[Prediction]) -> float:
    """Accuracy of always giving the commonest answer of a task."""
    by_task: dict[str, Counter[str | float]] = defaultdict(Counter)
    for prediction in predictions:
        by_task[prediction.task][prediction.answer] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_task.values()) / len(predictions)
