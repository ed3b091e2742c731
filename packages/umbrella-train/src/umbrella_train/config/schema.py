"""Looks up the type of a key in the configuration, for overrides and for "did you mean"."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def annotation_at(section: type[BaseModel], path: Sequence[str | int]) -> Any:
    """Return the annotation of a key, without `Annotated`.

    Args:
        section: Where the path starts.
        path: Keys and list positions below it.

    Returns:
        The annotation, or None where the schema has no such key or leaves it free.
    """
    annotation: Any = section
    for part in path:
        annotation = _child(without_none(annotation), part)
        if annotation is None:
            return None
    return _without_metadata(annotation)


def without_none(annotation: Any) -> Any:
    """Return the type itself where the annotation is `type | None`."""
    annotation = _without_metadata(annotation)
    if is_union(annotation):
        rest = [member for member in get_args(annotation) if member is not types.NoneType]
        return _without_metadata(rest[0]) if len(rest) == 1 else annotation
    return annotation


def allows_none(annotation: Any) -> bool:
    """Tell whether the annotation is `... | None`."""
    return is_union(annotation) and types.NoneType in get_args(annotation)


def is_union(annotation: Any) -> bool:
    """Tell whether the annotation is a union."""
    return get_origin(annotation) in (Union, types.UnionType)


def is_switch(annotation: Any) -> bool:
    """Tell whether the annotation is a bool, or a bool or something else: the key alone then says True."""
    annotation = _without_metadata(annotation)
    return annotation is bool or (is_union(annotation) and bool in get_args(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class that the annotation stands for, if it is one."""
    annotation = without_none(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def is_sequence(annotation: Any) -> bool:
    """Tell whether the annotation is a list or a tuple (or one of them or None)."""
    return get_origin(without_none(annotation)) in (list, tuple)


def is_mapping(annotation: Any) -> bool:
    """Tell whether the annotation is a dict (or a dict or None)."""
    return get_origin(without_none(annotation)) is dict


def _without_metadata(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _child(annotation: Any, part: str | int) -> Any:
    section = section_of(annotation)
    if section is not None:
        field = section.model_fields.get(str(part))
        return None if field is None else field.annotation
    if is_mapping(annotation):
        value = get_args(annotation)[1]
        return None if value is Any else value
    if is_sequence(annotation):
        return get_args(annotation)[0]
    return None
