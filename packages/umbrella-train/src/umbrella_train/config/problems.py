"""`ConfigError`, and pydantic's errors as sentences with dotted paths and "did you mean"."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from umbrella_data.errors import did_you_mean
from umbrella_train.config.schema import annotation_at, section_of
from umbrella_train.config.strict_yaml import SECRET_ADVICE, looks_secret
from umbrella_train.errors import RunError


class ConfigError(RunError):
    """All problems of a configuration at once.

    Args:
        problems: One sentence per problem, each with its dotted path.
        source: The file, or another name of where the configuration came from.
    """

    def __init__(self, problems: Sequence[str], *, source: str) -> None:
        self.problems = tuple(problems)
        self.source = source
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        super().__init__("\n".join([f"{source}: {count} in the configuration", *(f"  {text}" for text in problems)]))


def validation_problems(error: ValidationError, *, section: type[BaseModel]) -> list[str]:
    """Turn pydantic's errors in a section into sentences."""
    # pydantic appends "[key]" to the path of an invalid key of a table.
    found = [(tuple(part for part in details["loc"] if part != "[key]"), details) for details in error.errors()]
    return [
        f"{dotted(path)}: {_message(details, path, section=section)}"
        for path, details in found
        # A list with an invalid entry is also reported as too short.
        if not any(len(other) > len(path) and other[: len(path)] == path for other, _ in found)
    ]


def _message(details: ErrorDetails, path: Sequence[str | int], *, section: type[BaseModel]) -> str:
    if details["type"] == "extra_forbidden":
        return SECRET_ADVICE if looks_secret(str(path[-1])) else f"no such key{_meant(path, section=section)}"
    if details["type"] == "missing":
        return "is missing"
    message = details["msg"].removeprefix("Value error, ")
    # Ours name the value where it matters. A table may hold a secret.
    if details["type"] == "value_error" or isinstance(details["input"], dict):
        return message
    return f"{message[:1].lower()}{message[1:]} (it is {reprlib.repr(details['input'])})"


def _meant(path: Sequence[str | int], *, section: type[BaseModel]) -> str:
    """Suggest a similar key of the same section, or the same key of another one."""
    parent = section_of(annotation_at(section, path[:-1]))
    similar = did_you_mean(path[-1], parent.model_fields) if parent is not None else ""
    if path[0] == "stages" and len(path) == 3 and path[-1] in section.model_fields:
        return f" of a stage: {path[-1]} belongs to the whole run"
    same = next((key for key in _keys(section) if key.split(".")[-1] == path[-1]), None)
    return similar or (f"; did you mean {same!r}?" if same else "")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        below = section_of(field.annotation)
        if below is not None:
            yield from _keys(below, f"{prefix}{name}.")


def dotted(path: Sequence[str | int]) -> str:
    """Join a path with dots."""
    return ".".join(map(str, path))
