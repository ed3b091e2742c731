"""Rows of a file of answers, one for each row of a manifest; they are joined with it by `id`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umbrella_data.manifest.sample import Sample
from umbrella_data.modality import MODALITIES
from umbrella_train.evaluation.metrics import score_answer


def answer_row(sample: Sample, generated: str | None) -> dict[str, Any]:
    """The row of a sample, with its `id` and `subject` as in the manifest.

    Args:
        sample: The sample.
        generated: Text that the model generated; None if the sample was skipped, because a scan is unusable.
    """
    return {
        "id": sample.id,
        "subject": sample.subject,
        "task": sample.task,
        "modality": modality_name(sample.modalities),
        "question": question_text(sample),
        "generated": generated,
    }


def scored_row(sample: Sample, generated: str | None) -> dict[str, Any]:
    """The row of a sample with its score; arguments are those of `answer_row`.

    Returns:
        `answer_row`, and the keys of `umbrella_train.evaluation.metrics.Prediction` about the right answer and the
        score, which are None without an answer; `parsed` is what the text was read as.
    """
    answer = sample.answer
    score = None if answer is None or generated is None else score_answer(generated, answer)
    return {
        **answer_row(sample, generated),
        "type": None if answer is None else answer.type,
        "options": None if answer is None else answer.options,
        "answer": None if answer is None else answer.value,
        "unit": None if answer is None else answer.unit,
        "parsed": None if score is None else score.parsed,
        "score": None if score is None else score.value,
        "is_parsed": None if score is None else score.is_parsed,
    }


def question_text(sample: Sample) -> str:
    """Text of the last user turn."""
    return next(turn.text for turn in reversed(sample.messages) if turn.role == "user")


def modality_name(modalities: Sequence[str]) -> str:
    """Name of a sample's set of modalities in the metrics: `T1`, `T1+dMRI`, or `text` without any."""
    return "+".join(name for name in MODALITIES if name in modalities) or "text"
