"""The base class of all configuration sections, and the field types that several sections use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from umbrella_data.modality import find_modality


class Section(BaseModel):
    """A frozen section of the configuration; an unknown key is an error.

    Combinations of keys are checked by the field validator of the last of them, with `info.data`: it has the valid
    fields before it, so that one wrong value does not prevent the checks of the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_true_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and (_takes(kind, int) or _takes(kind, float)) and not _takes(kind, bool):
            raise ValueError(f"must be a number (it is {str(value).lower()})")  # pydantic reads true as 1
        return value


def _takes(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_takes(each, kind) for each in get_args(annotation))


def errors_at(problems: Sequence[tuple[str, str]]) -> ValidationError:
    """One error for several problems, each with its dotted path below the validated field."""
    return ValidationError.from_exception_data(
        "configuration",
        [
            InitErrorDetails(type=PydanticCustomError("value_error", message), loc=tuple(path.split(".")), input=None)
            for path, message in problems
        ],
    )


def _reject_two_names(table: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    named = validate(table)
    if isinstance(table, Mapping) and len(named) < len(table):
        raise ValueError(f"has two names of one modality among {', '.join(map(str, table))}; use one")
    return named


ModalityName = Annotated[str, AfterValidator(lambda name: find_modality(name).name)]
"""A modality as a key of a table; aliases become canonical names."""
UniqueNames = WrapValidator(_reject_two_names)
"""For tables of modalities."""

# Relative to the current directory, as on the command line. Stored as absolute, so that a run's copy stays valid.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
