"""Answers to a manifest's questions: predictions with hashed names, and rows that are joined with it by `id`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from umbrella_data.manifest.sample import Answer, Sample, hide_names
from umbrella_data.modality import MODALITIES
from umbrella_train.evaluation.predictions import Condition, Prediction, Reply, read_reply


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


def scored_row(sample: Sample, reply: Reply | None) -> dict[str, Any]:
    """The row of a sample with its score.

    Args:
        sample: The sample.
        reply: What the model said; None if the sample was skipped.

    Returns:
        `answer_row`, and the keys of `Prediction` about the right answer, the model's and the score, which are None
        without an answer; `probabilities` are those of the options.
    """
    answer = sample.answer
    read = {} if answer is None or reply is None else read_reply(reply, answer)
    scores = read.get("option_scores")
    from scipy.special import softmax  # late: takes a fraction of a second

    return {
        **answer_row(sample, None if reply is None else reply.generated),
        "type": None if answer is None else answer.type,
        "options": None if answer is None else answer.options,
        "answer": None if answer is None else answer.value,
        "unit": None if answer is None else answer.unit,
        **{key: read.get(key) for key in ("predicted", "score", "score_generated", "is_parsed")},
        "probabilities": None if scores is None else softmax(scores).tolist(),
        "interval": read.get("interval"),
    }


def make_prediction(
    sample: Sample, answer: Answer, reply: Reply, *, condition: Condition, subject_hash: Callable[[str], str]
) -> Prediction:
    """The prediction of a reply to a sample's question.

    Args:
        sample: The sample.
        answer: Its right answer.
        reply: What the model said.
        condition: With which scans.
        subject_hash: Returns what replaces the subject's name, and it and those of its files in the texts.
    """

    def hidden(value: Any) -> Any:
        return hide_names(value, sample, name=subject_hash) if isinstance(value, str) else value

    # Scored before names are replaced: the figures do not depend on the salt. Options belong to no subject.
    read = read_reply(reply, answer)
    texts = ("generated",) if answer.type == "choice" else tuple(read)
    return Prediction(
        subject=subject_hash(sample.subject),
        task=sample.task,
        modality=modality_name(sample.modalities),
        condition=condition,
        question=hidden(question_text(sample)),
        type=answer.type,
        options=answer.options,
        answer=answer.value if answer.type == "choice" else hidden(answer.value),
        unit=answer.unit,
        **{key: hidden(value) if key in texts else value for key, value in read.items()},
    )


def question_text(sample: Sample) -> str:
    """Text of the last user turn."""
    return next(turn.text for turn in reversed(sample.messages) if turn.role == "user")


def modality_name(modalities: Sequence[str]) -> str:
    """Name of a sample's set of modalities in the metrics: `T1`, `T1+dMRI`, or `text` without any."""
    return "+".join(name for name in MODALITIES if name in modalities) or "text"


def task_name(sample: Sample) -> str:
    """Name of a sample's group in the metrics, as in `T1/sex`."""
    return f"{modality_name(sample.modalities)}/{sample.task}"
