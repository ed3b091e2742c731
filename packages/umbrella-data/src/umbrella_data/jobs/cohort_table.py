"""What a cohort has: answers by task, repetition times, tasks of series, and masks, counted row by row.

Nothing here grows with the number of rows: names of tasks, options and units above `MAX_NAMES` count as one.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from umbrella_data.bids.age_unit import AGE_LIMITS, PER_YEAR, known_unit
from umbrella_data.bids.column_descriptions import parse_number
from umbrella_data.bids.label_values import MISSING_CODES
from umbrella_data.bids.participants_table import MISSING_CELLS
from umbrella_data.manifest.sample import Answer, Sample, Scan
from umbrella_data.modality import find_modality

Value = TypeVar("Value")

MAX_NAMES = 1000
"""The most names of one kind that are counted separately."""

OTHERS = "(others)"
"""The name of all above `MAX_NAMES`."""

_TASK_ENTITY = re.compile(r"(?:^|_)task-([A-Za-z0-9]+)")
# Not a part of a name: a brain age gap may be negative.
_AGE_TASK = "age"


@dataclass
class NumberSummary:
    """Numbers of one task in one unit.

    Attributes:
        is_age: Whether they are ages.
        unit: Their unit; ages without one are in years.
        count: How many there are, of any value.
        low: The smallest.
        high: The largest.
        mean: Their mean.
        num_impossible: Ages outside 0 to 120 years; usual codes for missing values are not among them.
    """

    is_age: bool = False
    unit: str | None = None
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    num_impossible: int = 0
    _codes: Counter[int] = field(default_factory=Counter)
    _valid_low: float = math.inf
    _valid_high: float = -math.inf

    def add(self, value: float) -> None:
        """Count a number."""
        self.count += 1
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.mean += value / self.count - self.mean / self.count  # in this order, nothing overflows
        if value in MISSING_CODES:
            self._codes[int(value)] += 1
        elif self._is_impossible(value):
            self.num_impossible += 1
        else:
            self._valid_low, self._valid_high = min(self._valid_low, value), max(self._valid_high, value)

    @property
    def missing_codes(self) -> Counter[int]:
        """Usual codes for missing values, such as -999, that are outside the range of the other values."""
        return Counter(
            {code: count for code, count in self._codes.items() if not self._valid_low <= code <= self._valid_high}
        )

    def _is_impossible(self, value: float) -> bool:
        per_year = PER_YEAR.get("years" if self.unit is None else known_unit(self.unit) or self.unit)
        return self.is_age and per_year is not None and not AGE_LIMITS[0] <= value / per_year <= AGE_LIMITS[1]


@dataclass
class TaskAnswers:
    """Answers of one task.

    Attributes:
        options: Rows of choices by the right option; an option that is never right has 0.
        numbers: The numbers by their unit.
        texts: Rows with a text as the answer: by the text if it stands for a missing value (`n/a`), else `OTHERS`.
        num_unanswered: Rows without `answer`.
    """

    options: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, NumberSummary] = field(default_factory=dict)
    texts: Counter[str] = field(default_factory=Counter)
    num_unanswered: int = 0

    def add(self, answer: Answer | None, *, task: str) -> None:
        """Count the answer of a row."""
        if answer is None:
            self.num_unanswered += 1
        elif answer.type == "number":
            unit = bounded(answer.unit or "", self.numbers)
            summary = self.numbers.setdefault(unit, NumberSummary(task.casefold() == _AGE_TASK, unit or None))
            summary.add(float(answer.value))
        elif answer.type == "choice":
            for option in answer.options:
                self.options[bounded(option, self.options)] += option == answer.value
        else:
            text = str(answer.value).strip().lower()
            self.texts[text if text in MISSING_CELLS else OTHERS] += 1

    @property
    def missing_codes(self) -> dict[str, int]:
        """Rows by a right answer that looks like a code for a missing value, such as -999 or `n/a`."""
        found = Counter({text: count for text, count in self.texts.items() if text != OTHERS})
        for option, count in self.options.items():
            if count and self._is_missing(option):
                found[option] += count
        for summary in self.numbers.values():
            found.update({str(code): count for code, count in summary.missing_codes.items()})
        return dict(sorted(found.items()))

    @property
    def num_impossible(self) -> int:
        """Ages outside 0 to 120 years."""
        return sum(summary.num_impossible for summary in self.numbers.values())

    def _is_missing(self, option: str) -> bool:
        number = parse_number(option.strip())
        if number not in MISSING_CODES:
            return option.strip().lower() in MISSING_CELLS
        parsed = [parse_number(other.strip()) for other in self.options]
        others = [other for other in parsed if other is not None and other not in MISSING_CODES]
        return not min(others, default=math.inf) <= number <= max(others, default=-math.inf)


@dataclass(frozen=True)
class CohortNote:
    """What may be wrong with the labels or scans of a cohort, without making a row or a file unusable.

    Attributes:
        code: `missing_codes` or `impossible_ages` of a task; `mixed_repetition_times` or `mixed_masks` of a modality.
        name: The task or modality.
        count: Rows with such answers; number of different repetition times; scans without a mask.
        words: What to do.
    """

    code: str
    name: str
    count: int
    words: str


@dataclass
class CohortTable:
    """Facts about different scans, by modality.

    Attributes:
        repetition_times: Usable series by their repetition time in s, to the millisecond; None if it is unknown.
        series_tasks: Series by the `task-` entity of their file name; "" without one.
        masks: Scans with (True) and without a mask.
    """

    repetition_times: dict[str, Counter[float | None]] = field(default_factory=lambda: defaultdict(Counter))
    series_tasks: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    masks: dict[str, Counter[bool]] = field(default_factory=lambda: defaultdict(Counter))

    def add_scan(self, scan: Scan) -> None:
        """Count a scan, by its names only."""
        self.masks[scan.modality][scan.mask is not None] += 1
        if find_modality(scan.modality).is_series:
            found = _TASK_ENTITY.search(scan.paths[0].name)
            tasks = self.series_tasks[scan.modality]
            tasks[bounded(found[1] if found else "", tasks)] += 1

    def add_repetition_time(self, modality: str, seconds: float | None) -> None:
        """Count a series that was read."""
        # Bounded: times are at most 100 s.
        self.repetition_times[modality][None if seconds is None else round(seconds, 3)] += 1

    @property
    def notes(self) -> list[CohortNote]:
        """Modalities whose scans differ in repetition time, or of which some only have a mask."""
        found = []
        for modality, times in sorted(self.repetition_times.items()):
            if (num_times := len(times.keys() - {None})) > 1:
                words = ("several repetition times: windows of as many frames differ in seconds; window_seconds of "
                         f"data.pipelines.{modality} interpolates to one")  # fmt: skip
                found.append(CohortNote("mixed_repetition_times", modality, num_times, words))
        for modality, masks in sorted(self.masks.items()):
            if len(masks) > 1:
                words = "scans with and without a mask: a model may learn the difference; give all of them one, or none"
                found.append(CohortNote("mixed_masks", modality, masks[False], words))
        return found


def bounded(name: str, counted: Mapping[str, object]) -> str:
    """The name to count under: `OTHERS` for a new one if there are too many."""
    return name if name in counted or len(counted) < MAX_NAMES else OTHERS


def add_answer(tasks: dict[str, TaskAnswers], sample: Sample) -> None:
    """Count the answer of a row under its task."""
    tasks.setdefault(bounded(sample.task, tasks), TaskAnswers()).add(sample.answer, task=sample.task)


def answer_notes(tasks: Mapping[str, TaskAnswers]) -> list[CohortNote]:
    """Tasks with answers that look like codes for missing values, or with impossible ages."""
    found = []
    for task, answers in sorted(tasks.items()):
        if codes := answers.missing_codes:
            values = ", ".join(f"{code or repr(code)} ({count:,})" for code, count in codes.items())
            words = f"answers that may be codes for a missing value: {values}; remove these rows if they are"
            found.append(CohortNote("missing_codes", task, sum(codes.values()), words))
        if answers.num_impossible:
            words = f"ages outside {AGE_LIMITS[0]} to {AGE_LIMITS[1]} years; correct the values or their unit"
            found.append(CohortNote("impossible_ages", task, answers.num_impossible, words))
    return found


def ordered(counts: Mapping[str, Counter[Value]]) -> Iterator[tuple[str, Value, int]]:
    """Modality, value and count of each entry of a `CohortTable`, the most frequent values of a modality first."""
    return ((name, value, count) for name, of_name in sorted(counts.items()) for value, count in of_name.most_common())
