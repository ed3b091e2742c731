"""A sample: one conversation about scans, with its turns, its scans and its scored answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]
AnswerType = Literal["choice", "number", "text"]

ROLES = ("system", "user", "assistant")
ANSWER_TYPES = ("choice", "number", "text")

REASONING_TAGS = ("<think>", "</think>")
"""What opens and closes the reasoning of an answer."""


def subject_key(name: str) -> str:
    """What is the same for two spellings of one subject: `sub-01`, `Sub-01` and `01`. Case matters otherwise."""
    return re.sub(r"^sub-", "", unicodedata.normalize("NFC", name.strip()), flags=re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """A scan in a conversation.

    Attributes:
        modality: The canonical name, such as `T1`.
        paths: Absolute paths: one file, or computed maps (FA, MD) in the order of the modality's channels.
        mask: Absolute path of its brain mask, see `umbrella_data.scan.voxels`; None for the whole scan.
    """

    modality: str
    paths: tuple[Path, ...]
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files, with the mask last."""
        return self.paths if self.mask is None else (*self.paths, self.mask)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: texts and scans in reading order. Only user turns have scans."""

    role: Role
    content: tuple[Scan | str, ...]

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The scans of this turn in reading order."""
        return tuple(item for item in self.content if isinstance(item, Scan))

    @property
    def text(self) -> str:
        """The texts of this turn, one per line."""
        return "\n".join(item for item in self.content if isinstance(item, str))


@dataclass(frozen=True)
class Answer:
    """The right answer, which makes a sample scorable.

    Attributes:
        type: `choice`, `number` or `text`.
        value: One of `options`, a finite number, or a text.
        options: The choices, in the order of the question; empty for the other types.
        unit: The unit of a number, such as `years`.
    """

    type: AnswerType
    value: str | float
    options: tuple[str, ...] = ()
    unit: str | None = None


@dataclass(frozen=True)
class Sample:
    """One row of a manifest. The last turn is the assistant's, or the user's in a row to generate an answer for."""

    id: str
    subject: str
    task: str
    messages: tuple[Turn, ...]
    answer: Answer | None = None

    @property
    def scans(self) -> tuple[Scan, ...]:
        """All scans in reading order."""
        return tuple(scan for turn in self.messages for scan in turn.scans)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modality of each scan in reading order."""
        return tuple(scan.modality for scan in self.scans)


def without_scans(messages: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns with their texts only."""
    return tuple(
        replace(turn, content=tuple(item for item in turn.content if isinstance(item, str))) for turn in messages
    )


def hide_names(text: str, sample: Sample, *, name: Callable[[str], str]) -> str:
    """A text with the names of a sample's subject and files replaced, in upper or lower case.

    Replaced are the subject with and without `sub-`, and the names and paths of files. Left as they are: names without
    a letter, since a subject `12` is also an age, and what follows `sub-` unless it has a letter and a digit.

    Args:
        text: A question or an answer.
        sample: The sample that it is about.
        name: Maps a name, as the text spells it, to what replaces it, such as its hash.
    """
    label = subject_key(sample.subject)
    names = {sample.subject, f"sub-{label}"} | ({label} if any(map(str.isdigit, label)) else set())
    names |= {each for scan in sample.scans for path in scan.files for each in (str(path), path.name)}
    lettered = sorted((each for each in names if any(map(str.isalpha, each))), key=len, reverse=True)
    pattern = "|".join(map(re.escape, lettered))
    # An underscore ends a name, as in sub-01_ses-1.
    return re.sub(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", lambda match: name(match[0]), text, flags=re.IGNORECASE)
