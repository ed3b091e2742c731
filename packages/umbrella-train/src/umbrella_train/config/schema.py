"""Looks up types of configuration keys, for overrides, messages and the report; keys with dots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def annotation_at(section: type[BaseModel], path: Sequence[str | int]) -> Any:
    """Return the annotation of a key, or list position, below a section, without `Annotated`.

    None if the schema has no such key or does not restrict it.
    """
    annotation: Any = section
    for part in path:
        annotation = _child(without_none(annotation), part)
        if annotation in (None, Any):
            return None
    return _without_metadata(annotation)


def without_none(annotation: Any) -> Any:
    """Return `type` for an annotation `type | None`, any other annotation as it is."""
    annotation = _without_metadata(annotation)
    rest = [member for member in _members(annotation) if member is not NoneType]
    return _without_metadata(rest[0]) if len(rest) == 1 else annotation


def allows_none(annotation: Any) -> bool:
    """Whether the annotation is `... | None`."""
    return NoneType in _members(annotation)


def is_switch(annotation: Any) -> bool:
    """Whether the annotation is a bool, or a union with bool: the flag without a value means True."""
    return bool in _members(_without_metadata(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of an annotation, if it is one, also of a section that may be a list instead."""
    for member in _members(without_none(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def is_sequence(annotation: Any) -> bool:
    """Whether the annotation is a list or a tuple (or one of them or None)."""
    return get_origin(without_none(annotation)) in (list, tuple)


def is_mapping(annotation: Any) -> bool:
    """Whether the annotation is a dict (or a dict or None)."""
    return get_origin(without_none(annotation)) is dict


def words_of(annotation: Any) -> list[str]:
    """The words that a key takes, if its annotation is a `Literal` or a union with one."""
    literals = [member for member in _members(without_none(annotation)) if get_origin(member) is Literal]
    return [str(word) for literal in literals for word in get_args(literal)]


def dotted_keys(section: type[BaseModel], *, tables: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below a section, as on the command line, with its annotation without `None` and `Annotated`.

    A table of sections has the names of `tables` as keys. Positions of lists are not included.
    """
    for name, field in section.model_fields.items():
        key, annotation = f"{prefix}{name.replace('_', '-')}", without_none(field.annotation)
        below = section_of(annotation)
        if below is not None:
            yield from dotted_keys(below, tables=tables, prefix=f"{key}.")
        elif is_mapping(annotation) and (below := section_of(get_args(annotation)[1])) is not None:
            for table in tables:
                yield from dotted_keys(below, tables=tables, prefix=f"{key}.{table}.")
        # A section that can also be null, or a list, is a key with a value of its own.
        if below is None or field.annotation is not below:
            yield key, annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _without_metadata(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _child(annotation: Any, part: str | int) -> Any:
    if isinstance(part, int):  # a position, also of a list that may be a section instead
        lists = [member for member in _members(annotation) if is_sequence(member)]
        return get_args(lists[0])[0] if lists else None
    section = section_of(annotation)
    if section is not None:
        field = section.model_fields.get(str(part))
        return None if field is None else field.annotation
    if is_mapping(annotation):
        return get_args(annotation)[1]
    return None


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections under dotted keys."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
