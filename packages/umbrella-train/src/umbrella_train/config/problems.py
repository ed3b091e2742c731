"""`ConfigError`, and pydantic's errors as sentences with dotted paths and "did you mean"."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from umbrella_train.config.schema import annotation_at, section_of
from umbrella_train.config.section import Problem, SectionError
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


def validation_problems(
    error: ValidationError, *, section: type[BaseModel], taken_out: Collection[tuple[str, ...]] = ()
) -> list[str]:
    """Turn pydantic's errors into sentences.

    Args:
        error: What pydantic raised.
        section: The model that was validated.
        taken_out: Paths of wrong values that were taken out before. What may be wrong for want of them is passed over.
    """
    errors = error.errors()
    # Wrong now or before: pydantic counts a list's entries without the wrong ones.
    wrong = {*taken_out, *(as_text(details["loc"]) for details in errors)}
    told = []
    for details in errors:
        at = as_text(details["loc"])
        is_for_want = at in taken_out or any(path[: len(at)] == at for path in wrong if path != at)
        if not is_for_want or isinstance(_cause(details), SectionError):
            told += _sentences(details, section=section, taken_out=taken_out)
    return told


def _cause(details: ErrorDetails) -> object:
    return details.get("ctx", {}).get("error")


def _sentences(details: ErrorDetails, *, section: type[BaseModel], taken_out: Collection[tuple[str, ...]]) -> list[str]:
    path = dotted(details["loc"])
    cause = _cause(details)
    if isinstance(cause, SectionError):
        is_section = section_of(annotation_at(section, details["loc"])) is not None
        return [
            f"{dotted([*details['loc'], problem.key])}: {problem.message}"
            for problem in cause.problems
            if not _touches(_grounds(problem, at=details["loc"], is_section=is_section), taken_out)
        ]
    if details["type"] == "extra_forbidden":
        meant = _meant(details["loc"], section=section)
        return [f"{path}: no such key" + (f"; did you mean {meant}?" if meant else "")]
    if details["type"] == "missing":
        return [f"{path}: is missing"]
    message = details["msg"].removeprefix("Value error, ")
    return [f"{path}: {message[:1].lower()}{message[1:]} (it is {reprlib.repr(details['input'])})"]


def _grounds(problem: Problem, *, at: Sequence[str | int], is_section: bool) -> list[tuple[str, ...]]:
    """The paths whose values a problem may come from. A table finds fault with its keys alone, a section with all."""
    if problem.depends_on is None and is_section:
        return [as_text(at)]
    keys = [key for key in (problem.key, *(problem.depends_on or ())) if key]
    return [(*as_text(at), *key.split(".")) for key in keys]


def _touches(paths: Iterable[tuple[str, ...]], others: Collection[tuple[str, ...]]) -> bool:
    """Tell whether a path of the first is one of the others, or above or below it."""
    return any(path[: len(other)] == other[: len(path)] for path in paths for other in others)


def as_text(path: Sequence[str | int]) -> tuple[str, ...]:
    """The path with positions in lists as text."""
    return tuple(map(str, path))


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
