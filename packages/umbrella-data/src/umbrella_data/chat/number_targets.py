"""Numbers in the answers that a model learns: with fixed decimals, and drawn around the true value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from umbrella_data.manifest.answers import contradiction, count_decimals, replace_number
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Sample, Turn

# Rows of a manifest whose answers are looked at, evenly spread.
_MAX_ROWS = 20_000


@dataclass(frozen=True)
class NumberTargets:
    """How the number in the last answer is written, in rows whose answer is a `number`.

    Attributes:
        decimals: Decimals of every such number, rounded from the scored value; None keeps the words.
        smoothing: By task, the standard deviation of the numbers to learn, in the unit of the answer.
    """

    decimals: int | None = None
    smoothing: Mapping[str, float] = field(default_factory=dict)

    def problem(self, sample: Sample) -> str | None:
        """Why the number of a sample cannot be written: its words hold another number, or none; None if it can."""
        if not self._concerns(sample) or (found := contradiction(sample)) is None:
            return None
        return f"{found}; number_decimals and number_smoothing need one readable number that equals the value"

    def write(self, sample: Sample) -> tuple[Turn, ...]:
        """The conversation with the number in fixed decimals; unchanged for samples with a `problem`."""
        answer, decimals = sample.answer, self.decimals
        if answer is None or decimals is None or not self._concerns(sample) or contradiction(sample) is not None:
            return sample.messages
        return _with_number(sample, float(answer.value), decimals=decimals)

    def draw(self, sample: Sample, *, seed: int, may_be_negative: bool) -> tuple[Turn, ...] | None:
        """The conversation with a number from a normal distribution around the value, rounded to its decimals.

        In expectation, the cross-entropy on such numbers is that on the smoothed distribution.

        Args:
            sample: A sample without a `problem`.
            seed: Seed of this draw.
            may_be_negative: Whether numbers of this task can be below 0. If not, draws below 0 are reflected at 0,
                which raises the mean of values within about two standard deviations of 0.

        Returns:
            None for samples whose task is not smoothed.
        """
        answer, deviation = sample.answer, self.smoothing.get(sample.task)
        if answer is None or deviation is None or not self._concerns(sample):
            return None
        decimals = self.decimals
        if decimals is None:
            decimals = count_decimals(sample.messages[-1].text, unit=answer.unit)
        number = float(answer.value) + deviation * float(np.random.default_rng(seed).standard_normal())
        return _with_number(sample, number if may_be_negative else abs(number), decimals=decimals)

    def _concerns(self, sample: Sample) -> bool:
        """Whether the number of a sample is written; prompts without an answer, and other answers, are not changed."""
        is_number = sample.answer is not None and sample.answer.type == "number"
        is_answered = sample.messages[-1].role == "assistant"
        return is_number and is_answered and (self.decimals is not None or sample.task in self.smoothing)


def number_tasks(manifest: Manifest) -> dict[str, bool]:
    """The tasks of a manifest with answers of type `number`, and whether some are negative.

    Of a manifest with more than 20,000 rows, so many are looked at.

    Raises:
        ManifestError: With every problem of the first invalid row.
    """
    found: dict[str, bool] = {}
    for row in range(0, len(manifest), max(1, -(-len(manifest) // _MAX_ROWS))):
        sample = manifest[row]
        if sample.answer is not None and sample.answer.type == "number":
            found[sample.task] = found.get(sample.task, False) or float(sample.answer.value) < 0
    return found


def _with_number(sample: Sample, value: float, *, decimals: int) -> tuple[Turn, ...]:
    *earlier, last = sample.messages
    unit = None if sample.answer is None else sample.answer.unit
    text = replace_number(last.text, value, decimals=decimals, unit=unit)
    return (*earlier, replace(last, content=(text,)))
