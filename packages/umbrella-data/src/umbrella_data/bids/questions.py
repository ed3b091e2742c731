"""Question templates: questions about a scan's metadata (modality, frames, b0 volumes) and its subject's labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from umbrella_data.modality import MODALITIES
from umbrella_data.seeding import derive_seed

Labels = Mapping[str, str | float]


@dataclass(frozen=True)
class ScanMetadata:
    """Metadata of one scan, without its voxels.

    Attributes:
        modality: The canonical name.
        num_frames: Frames of a series.
        num_b0: Volumes of a diffusion series without diffusion weighting.
        labels: The subject's labels by task: a text for a choice, a number for a number.
    """

    modality: str
    num_frames: int | None = None
    num_b0: int | None = None
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question template.

    Attributes:
        task: Its name in the results.
        texts: Wordings; one is drawn for each row.
        answer: Returns the right answer about a scan, or None if the question does not apply; by default the subject's
            label of the task.
        options: The choices of a `choice` question; empty for a `number`.
        unit: The unit of a number.
    """

    task: str
    texts: tuple[str, ...]
    answer: Callable[[ScanMetadata], str | float | None] | None = None
    options: tuple[str, ...] = ()
    unit: str | None = None

    def ask(self, scan: ScanMetadata, *, draw: int) -> tuple[str, str, dict[str, Any]] | None:
        """Ask about one scan.

        Args:
            scan: Metadata of the scan.
            draw: Any integer; selects the wording.

        Returns:
            The question, the text of the answer and the manifest's `answer`; None if the question does not apply.
        """
        value = scan.labels.get(self.task) if self.answer is None else self.answer(scan)
        if value is None:
            return None
        text = self.texts[derive_seed(draw) % len(self.texts)]
        if self.options:
            return text, str(value), {"type": "choice", "options": list(self.options), "value": value}
        # The shortest digits that parse to the same number, without an exponent: the trained text is the scored value.
        digits = np.format_float_positional(float(value), trim="-")
        return text, digits, {"type": "number", "value": value, "unit": self.unit}


_KINDS = tuple(spec.description for spec in MODALITIES.values())

METADATA_QUESTIONS: tuple[Question, ...] = (
    Question(
        task="modality",
        texts=("What kind of scan is this?", f"Which is this: {', '.join(_KINDS[:-1])}, or {_KINDS[-1]}?"),
        answer=lambda scan: MODALITIES[scan.modality].description,
        options=_KINDS,
    ),
    Question(
        task="num_frames",
        texts=("How many frames does this series have?", "How many time points were recorded?"),
        answer=lambda scan: scan.num_frames,
        unit="frames",
    ),
    Question(
        task="num_b0",
        texts=("How many b0 volumes does this diffusion series have?", "How many volumes have no diffusion weighting?"),
        answer=lambda scan: scan.num_b0,
        unit="volumes",
    ),
)


AGE = Question(
    task="age",
    texts=("How old is this person, in years?", "What is the age of this person in years?"),
    unit="years",
)
SEX = Question(
    task="sex",
    texts=("What is the sex of this person?", "Is this person female or male?"),
    options=("female", "male"),
)


def choice_question(column: str, *, options: tuple[str, ...]) -> Question:
    """A question about a categorical column of `participants.tsv`."""
    name = column.replace("_", " ")
    listed = f"{', '.join(options[:-1])} or {options[-1]}"
    return Question(
        task=column,
        texts=(f"What is the {name} of this person?", f"What is the {name} of this person: {listed}?"),
        options=options,
    )


def number_question(column: str, *, unit: str | None) -> Question:
    """A question about a numeric column of `participants.tsv`."""
    name = column.replace("_", " ")
    text = f"What is the {name} of this person" + (f", in {unit}?" if unit else "?")
    return Question(task=column, texts=(text,), unit=unit)
