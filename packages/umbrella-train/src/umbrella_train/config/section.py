"""The base of every configuration section, and the way a validator reports several problems at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the configuration; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Problem(NamedTuple):
    """What one validator of a section found."""

    key: str
    """Path of the key at fault below the section; may be empty."""
    message: str
    """What is wrong with it."""
    depends_on: tuple[str, ...] | None = None
    """Other keys of the section whose defaults, standing in for wrong values, might bring it about; None: any key."""


class SectionError(ValueError):
    """Several problems found by one validator.

    Args:
        problems: Each a `Problem`, or the first two of its entries.
    """

    def __init__(self, problems: Sequence[Problem | tuple[str, str]]) -> None:
        self.problems = tuple(problem if isinstance(problem, Problem) else Problem(*problem) for problem in problems)
        super().__init__(
            "; ".join(f"{each.key}: {each.message}" if each.key else each.message for each in self.problems)
        )
