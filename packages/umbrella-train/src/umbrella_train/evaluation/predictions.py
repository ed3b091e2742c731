"""Predictions: a model's answers by likelihood and in words, and their scores by the type of the right answer.

To add an answer type, add a row to `READERS`, and its figures to `umbrella_train.evaluation.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from umbrella_data.manifest.answers import normalise, read_choice, read_number, without_reasoning
from umbrella_data.manifest.sample import Answer

Condition = Literal["accuracy", "shuffled", "swapped", "no_scan"]
CONDITIONS: tuple[Condition, ...] = ("accuracy", "shuffled", "swapped", "no_scan")


@dataclass(frozen=True)
class Reply:
    """What a model says to one question.

    Attributes:
        generated: Text that it generated; None if it was only asked for likelihoods.
        option_scores: For a choice, the log-likelihood of each option in nats: the sum over its tokens.
        option_lengths: Number of tokens of each option, with its end of turn.
        expected: For a number, the expected value over the candidates.
        interval: The central 80 % of the candidates' probability.
    """

    generated: str | None = None
    option_scores: tuple[float, ...] | None = None
    option_lengths: tuple[int, ...] | None = None
    expected: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
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
        predicted: The model's answer: the likeliest option, the expected number, or what the text is read as; None if
            it is not readable.
        score: 1 or 0 for a hit or a miss, the absolute error for a number; None for an unreadable number.
        generated: See `Reply`; None if the question was answered by likelihood only.
        score_generated: The score of the text.
        is_parsed: Whether the text is readable as an answer.
        option_scores: See `Reply`.
        option_lengths: See `Reply`.
        expected: See `Reply`.
        interval: See `Reply`.
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
    predicted: str | float | None = None
    score: float | None
    generated: str | None
    score_generated: float | None = None
    is_parsed: bool | None
    option_scores: tuple[float, ...] | None = None
    option_lengths: tuple[int, ...] | None = None
    expected: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Its group in the metrics, as in `T1/sex`."""
        return f"{self.modality}/{self.task}"

    def to_row(self) -> dict[str, Any]:
        """The row of predictions.jsonl."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prediction:
        """A prediction from its row, also of an earlier version without likelihoods."""
        found: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return cls(**{key: value for key, value in found.items() if key in cls.__dataclass_fields__})


def _read_text(generated: str, _: Answer) -> str | None:
    return normalise(without_reasoning(generated)) or None


READERS: Mapping[str, Callable[[str, Answer], str | float | None]] = MappingProxyType(
    {
        "choice": lambda generated, answer: read_choice(generated, answer.options),
        "number": lambda generated, answer: read_number(generated, unit=answer.unit),
        "text": _read_text,
    }
)
"""What a generated text is read as, by the type of the right answer; None if it is not readable."""


def read_reply(reply: Reply, answer: Answer) -> dict[str, Any]:
    """The fields of `Prediction` about a model's answer and its score."""
    parsed = None if reply.generated is None else READERS[answer.type](reply.generated, answer)
    predicted = parsed
    if reply.option_scores is not None:
        predicted = answer.options[max(range(len(answer.options)), key=reply.option_scores.__getitem__)]
    elif reply.expected is not None:
        predicted = reply.expected
    return {
        **asdict(reply),
        "predicted": predicted,
        "score": score(predicted, answer),
        "score_generated": None if reply.generated is None else score(parsed, answer),
        "is_parsed": None if reply.generated is None else parsed is not None,
    }


def score(predicted: str | float | None, answer: Answer) -> float | None:
    """1 or 0 for a hit or a miss, an unreadable one included; the absolute error of a number, None if unreadable."""
    if answer.type == "number":
        return None if predicted is None else abs(float(predicted) - float(answer.value))
    right = normalise(str(answer.value)) if answer.type == "text" else answer.value
    return float(predicted == right)
