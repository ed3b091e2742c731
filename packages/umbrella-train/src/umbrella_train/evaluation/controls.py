"""Plans the questions of an evaluation: with the own scan, and with control scans or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbrella_data import ConversationDataset
from umbrella_data.manifest.sample import Sample
from umbrella_train.evaluation.predictions import Condition


@dataclass(frozen=True)
class Question:
    """One question of an evaluation.

    Attributes:
        index: Index of the sample.
        condition: `accuracy` (with its own scans), or a control.
        scans_from: Index of the sample whose scans replace its own.
    """

    index: int
    condition: Condition
    scans_from: int | None = None


def plan_questions(
    dataset: ConversationDataset,
    *,
    controls: bool,
    seed: int,
    max_samples: int | None = None,
    every_row: bool = False,
) -> list[Question]:
    """List the questions of an evaluation: a pure function of its arguments, the same on every rank.

    The controls are `shuffled` (scans of another subject), `swapped` (scans of a subject with another answer) and
    `no_scan`. Control scans come from the same task and have the same list of modalities. `shuffled` permutes the
    subjects of a task in one random cycle, so that no subject gets its own scan. A task with one subject has no
    `shuffled`, a task with one answer no `swapped`.

    Args:
        dataset: Samples with the questions.
        controls: Whether to add the three controls.
        seed: Seed of the choice of control scans and samples.
        max_samples: Maximum number of samples for each list of modalities; those with an answer come first.
        every_row: Whether samples without an answer are asked too, with their own scans. The questions about the others
            do not depend on it.

    Returns:
        Questions, with similar prompts next to each other.
    """
    rng = np.random.default_rng(seed)
    samples = {index: dataset.sample(index) for index in range(len(dataset))}
    by_modalities: dict[tuple[str, ...], list[int]] = defaultdict(list)
    without_answer: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, sample in samples.items():
        if sample.answer is not None:
            by_modalities[dataset.modalities(index)].append(index)
        elif every_row:
            without_answer[dataset.modalities(index)].append(index)
    questions: list[Question] = []
    for modalities, indices in sorted(by_modalities.items()):
        chosen = sorted(rng.permutation(indices)[:max_samples].tolist())
        questions += [Question(index, "accuracy") for index in chosen]
        if controls and modalities:
            for pool in _pools(indices, samples):
                selected = sorted(set(pool).intersection(chosen))
                questions += _shuffled(selected, pool=pool, samples=samples, rng=rng)
                questions += _swapped(selected, pool=pool, samples=samples, rng=rng)
            questions += [Question(index, "no_scan") for index in chosen]
    for modalities, indices in sorted(without_answer.items()):
        num_left = None if max_samples is None else max(0, max_samples - len(by_modalities[modalities]))
        questions += [Question(index, "accuracy") for index in sorted(rng.permutation(indices)[:num_left].tolist())]
    return questions


def repeated_questions(questions: Sequence[Question], dataset: ConversationDataset) -> dict[int, int]:
    """Positions of questions without scans that have the same words as an earlier one, with the position of that one.

    They are asked once. Likelihoods that are computed in other batches differ by rounding errors, and an AUROC,
    which sees only the order, would be that of the batches.
    """
    first: dict[Any, int] = {}
    found = {}
    for position, question in enumerate(questions):
        if question.condition == "no_scan":
            sample = dataset.sample(question.index)
            turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
            words = tuple((turn.role, turn.text) for turn in turns)
            answer = sample.answer
            key = (words, sample.modalities, sample.task, answer and (answer.type, answer.options, answer.unit))
            if first.setdefault(key, position) != position:
                found[position] = first[key]
    return found


def _pools(indices: Sequence[int], samples: Mapping[int, Sample]) -> list[list[int]]:
    """Indices of the samples of each task, which can exchange scans."""
    pools: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        pools[samples[index].task].append(index)
    return [pools[task] for task in sorted(pools)]


def _shuffled(
    selected: Sequence[int], *, pool: Sequence[int], samples: Mapping[int, Sample], rng: np.random.Generator
) -> list[Question]:
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index in pool:
        by_subject[samples[index].subject].append(index)
    if len(by_subject) < 2:
        return []
    cycle = [str(subject) for subject in rng.permutation(sorted(by_subject))]
    partner = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [
        Question(index, "shuffled", int(rng.choice(by_subject[partner[samples[index].subject]]))) for index in selected
    ]


def _swapped(
    selected: Sequence[int], *, pool: Sequence[int], samples: Mapping[int, Sample], rng: np.random.Generator
) -> list[Question]:
    order = rng.permutation(pool).tolist()
    questions = []
    for index in selected:
        # The first match after a random position, instead of comparing all pairs.
        start = int(rng.integers(len(order)))
        candidates = (order[(start + step) % len(order)] for step in range(len(order)))
        other = next((other for other in candidates if _differ(samples[index], samples[other])), None)
        if other is not None:
            questions.append(Question(index, "swapped", other))
    return questions


def _differ(one: Sample, other: Sample) -> bool:
    """Whether two samples have different subjects and different answers."""
    return one.subject != other.subject and _value(one) != _value(other)


def _value(sample: Sample) -> str | float:
    assert sample.answer is not None, "only samples with an answer are in a pool"
    return sample.answer.value
