"""Which scan each question gets: its own, another subject's, that of a subject whose answer differs, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from umbrella_data.manifest.sample import Sample
from umbrella_train.evaluation.metrics import Condition


class QuestionSource(Protocol):
    """What planning needs of a `ConversationDataset`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def sample(self, index: int, /) -> Sample:
        """The sample at a position."""
        ...

    def modalities(self, index: int, /) -> tuple[str, ...]:
        """The modality of each scan of a sample, in reading order, without reading scans."""
        ...


@dataclass(frozen=True)
class Question:
    """One question to ask.

    Attributes:
        index: The sample that asks.
        condition: Its own scans, or a control.
        scans_from: The sample whose scans it gets instead of its own.
    """

    index: int
    condition: Condition
    scans_from: int | None = None


def plan_questions(
    dataset: QuestionSource, *, controls: bool, seed: int, max_samples: int | None = None
) -> list[Question]:
    """List the questions of an evaluation: a pure function of its arguments, the same on every rank.

    A control's scans come from the same task and the same list of modalities. `shuffled` sends the subjects of a task
    round one random cycle, so that nobody gets a scan of their own. Where a task has one subject, or one answer only,
    the control does not exist and is left out.

    Args:
        dataset: The questions.
        controls: Whether to add the three controls.
        seed: Seed of the choice of partners and of samples.
        max_samples: Questions to ask, for each list of modalities.

    Returns:
        Questions with similar prompts side by side.
    """
    rng = np.random.default_rng(seed)
    samples = {index: dataset.sample(index) for index in range(len(dataset))}
    by_modalities: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, sample in samples.items():
        if sample.answer is not None:
            by_modalities[dataset.modalities(index)].append(index)
    questions: list[Question] = []
    for modalities, indices in sorted(by_modalities.items()):
        chosen = sorted(rng.permutation(indices)[:max_samples].tolist())
        questions += [Question(index, "accuracy") for index in chosen]
        if controls and modalities:
            for pool in _pools(indices, samples):
                asked = sorted(set(pool).intersection(chosen))
                questions += _shuffled(asked, pool=pool, samples=samples, rng=rng)
                questions += _swapped(asked, pool=pool, samples=samples, rng=rng)
            questions += [Question(index, "no_scan") for index in chosen]
    return questions


def _pools(indices: Sequence[int], samples: Mapping[int, Sample]) -> list[list[int]]:
    """The samples that may lend each other scans: those of one task."""
    pools: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        pools[samples[index].task].append(index)
    return [pools[task] for task in sorted(pools)]


def _shuffled(
    asked: Sequence[int], *, pool: Sequence[int], samples: Mapping[int, Sample], rng: np.random.Generator
) -> list[Question]:
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index in pool:
        by_subject[samples[index].subject].append(index)
    if len(by_subject) < 2:
        return []
    cycle = [str(subject) for subject in rng.permutation(sorted(by_subject))]
    partner = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [
        Question(index, "shuffled", int(rng.choice(by_subject[partner[samples[index].subject]]))) for index in asked
    ]


def _swapped(
    asked: Sequence[int], *, pool: Sequence[int], samples: Mapping[int, Sample], rng: np.random.Generator
) -> list[Question]:
    order = rng.permutation(pool).tolist()
    questions = []
    for index in asked:
        # From a random place on, the first that fits: not a look at every pair.
        start = int(rng.integers(len(order)))
        candidates = (order[(start + step) % len(order)] for step in range(len(order)))
        other = next((other for other in candidates if _differ(samples[index], samples[other])), None)
        if other is not None:
            questions.append(Question(index, "swapped", other))
    return questions


def _differ(one: Sample, other: Sample) -> bool:
    """Tell whether two samples are of different subjects and have different answers."""
    return one.subject != other.subject and _value(one) != _value(other)


def _value(sample: Sample) -> str | float:
    assert sample.answer is not None, "only samples with an answer are in a pool"
    return sample.answer.value
