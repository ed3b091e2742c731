"""`ConfigError`, and pydantic's errors as sentences with dotted paths and "did you mean"."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from umbrella_train.config.schema import annotation_at, section_of
from umbrella_train.config.section import SectionError
from umbrella_train.errors import RunError


class ConfigError(RunError):
    """All problems of a configuration at once.

    Args:
        problems: One sentence a problem, each with its dotted path.
        source: The file, or another name of where the configuration came from.
    """

    def __init__(self, problems: Sequence[str], *, source: str) -> None:
        self.problems = tuple(problems)
        self.source = source
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        super().__init__("\n".join([f"{source}: {count} in the configuration", *(f"  {text}" for text in problems)]))


def validation_problems(error: ValidationError, *, section: type[BaseModel]) -> list[str]:
    """Turn pydantic's errors into sentences.

    Args:
        error: What pydantic raised.
        section: The model that was validated.
    """
    return [text for details in error.errors() for text in _sentences(details, section=section)]


def _sentences(details: ErrorDetails, *, section: type[BaseModel]) -> list[str]:
    path = dotted(details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, SectionError):
        return [f"{dotted([*details['loc'], key])}: {message}" for key, message in cause.problems]
    if details["type"] == "extra_forbidden":
        meant = _meant(details["loc"], section=section)
        return [f"{path}: no such key" + (f"; did you mean {meant}?" if meant else "")]
    if details["type"] == "missing":
        return [f"{path}: is missing"]
    message = details["msg"].removeprefix("Value error, ")
    return [f"{path}: {message[:1].lower()}{message[1:]} (it is {reprlib.repr(details['input'])})"]


def _meant(path: Sequence[str | int], *, section: type[BaseModel]) -> str | None:
    """Find the nearest key of the same section, or the same key in another one."""
    parent = section_of(annotation_at(section, path[:-1]))
    siblings = [] if parent is None else list(parent.model_fields)
    near = difflib.get_close_matches(str(path[-1]), siblings, n=1)
    if near:
        return dotted([*path[:-1], near[0]])
    return next((other for other in _keys(section) if other.split(".")[-1] == path[-1]), None)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        below = section_of(field.annotation)
        if below is not None:
            yield from _keys(below, f"{prefix}{name}.")


def dotted(path: Sequence[str | int]) -> str:
    """Join a path with dots, empty parts left out."""
    return ".".join(str(part) for part in path if part != "")
