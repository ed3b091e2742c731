"""The possible answers to the questions of a task, in the words of the training data."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umbrella_data.files.atomic import write_atomically
from umbrella_data.manifest.answers import (
    count_decimals,
    normalise,
    read_number,
    replace_number,
    without_reasoning,
)
from umbrella_data.manifest.sample import Sample
from umbrella_train.evaluation.answers import task_name

MAX_CANDIDATES = 101
"""Numbers that are compared for one question."""
_EXPONENT = re.compile(r"\d[eE][-+]?\d")


@dataclass(frozen=True)
class AnswerSpace:
    """The answers of one task in training.

    Attributes:
        words: For each option of a `choice`, its commonest text in training.
        frame: The commonest text of a `number`, with any number in it.
        decimals: Digits after the point.
        is_fixed: Whether every number has that many; otherwise zeros at the end are omitted.
        minimum: The smallest number in training; None for a `choice`.
        maximum: The largest one.
    """

    words: Mapping[str, str] | None = None
    frame: str = "0"
    decimals: int = 0
    is_fixed: bool = True
    minimum: float | None = None
    maximum: float | None = None

    def option_texts(self, options: Sequence[str]) -> list[str]:
        """The texts of options, also in another letter case; one that training did not have is its own text."""
        words = {normalise(option): text for option, text in (self.words or {}).items()}
        return [words.get(normalise(option), option) for option in options]

    def numbers(self, grid: Sequence[float] | None = None) -> list[float]:
        """Candidate numbers in ascending order, at most `MAX_CANDIDATES` of them without a grid.

        Args:
            grid: First, last and step, rounded to the decimals of training; None for the range of the training answers,
                with the smallest step that is a multiple of the last digit.
        """
        if grid is not None:
            first, last, step = grid
            steps = range(math.floor((last - first) / step + 1e-9) + 1)
            return list(dict.fromkeys(round(first + position * step, self.decimals) for position in steps))
        if self.minimum is None or self.maximum is None:
            return []
        # In units of the last digit, so that sums are exact.
        scale = 10**self.decimals
        low, high = round(self.minimum * scale), round(self.maximum * scale)
        step = max(1, -(-(high - low + 1) // MAX_CANDIDATES))
        return [number / scale for number in range(low, high + 1, step)]

    def number_text(self, number: float) -> str:
        """A number as training writes it."""
        decimals = self.decimals
        if not self.is_fixed:
            shortest = np.format_float_positional(round(number, decimals), trim="-")
            decimals = len(shortest.partition(".")[2])
        return replace_number(self.frame, number, decimals=decimals)


def collect_answer_spaces(samples: Iterable[Sample], *, decimals: int | None = None) -> dict[str, AnswerSpace]:
    """The answer spaces of the tasks of training samples, by `task_name`.

    A task has none if its numbers are not written in plain digits.

    Args:
        samples: Training samples; those without an answer of type `choice` or `number` do not count.
        decimals: Digits after the point with which training writes numbers, if not those of the samples.
    """
    texts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    frames: dict[str, Counter[str]] = defaultdict(Counter)
    num_decimals: dict[str, Counter[int]] = defaultdict(Counter)
    ranges: dict[str, tuple[float, float]] = {}
    for sample in samples:
        answer, name = sample.answer, task_name(sample)
        words = without_reasoning(sample.messages[-1].text).strip()
        if answer is None or sample.messages[-1].role != "assistant":
            continue
        if answer.type == "choice":
            texts[name][str(answer.value)][words] += 1
        elif answer.type == "number" and not _EXPONENT.search(words):
            if read_number(words, unit=answer.unit) is None:
                continue
            # A number with four digits keeps a comma between them.
            frames[name][replace_number(words, 1000, decimals=0, unit=answer.unit)] += 1
            num_decimals[name][count_decimals(words, unit=answer.unit)] += 1
            low, high = ranges.get(name, (math.inf, -math.inf))
            ranges[name] = (min(low, float(answer.value)), max(high, float(answer.value)))
    spaces = {
        name: AnswerSpace(words={option: counts.most_common(1)[0][0] for option, counts in options.items()})
        for name, options in texts.items()
    }
    for name, counts in frames.items():
        frame = counts.most_common(1)[0][0]
        with_comma = frame.replace("1000", "1,000")  # numbers below 1,000 do not show it
        found, bounds = num_decimals[name], ranges[name]
        if decimals is not None:
            bounds = (round(bounds[0], decimals), round(bounds[1], decimals))
        spaces[name] = AnswerSpace(
            frame=with_comma if with_comma in counts else frame,
            decimals=found.most_common(1)[0][0] if decimals is None else decimals,
            is_fixed=len(found) == 1 or decimals is not None,
            minimum=bounds[0],
            maximum=bounds[1],
        )
    return spaces


def find_answer_space(spaces: Mapping[str, AnswerSpace], sample: Sample) -> AnswerSpace | None:
    """The space of a sample's task, or that of the task with other modalities; None if training did not have it."""
    others = (space for name, space in spaces.items() if name.partition("/")[2] == sample.task)
    return spaces.get(task_name(sample)) or next(others, None)


def write_answer_spaces(path: Path, spaces: Mapping[str, AnswerSpace]) -> None:
    """Write the spaces as JSON."""
    content = {name: asdict(space) for name, space in sorted(spaces.items())}
    write_atomically(path, [json.dumps(content, ensure_ascii=False, indent=1).encode()])


def read_answer_spaces(path: Path) -> dict[str, AnswerSpace]:
    """Read what `write_answer_spaces` wrote; empty without the file, as in a run of an earlier version."""
    if not path.exists():
        return {}
    content: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {name: AnswerSpace(**entries) for name, entries in content.items()}
