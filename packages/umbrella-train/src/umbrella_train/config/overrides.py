"""Command-line overrides, as in `--model.modalities.T1.patch-size 8 8 8`, and their description for `--help`.

Overrides are applied to the raw content, before validation: problems of the file and of the overrides are reported
together, an override can fix the file, and can set keys that the file does not have. (tyro, which prints the help,
parses only on top of a valid default, and not into a section that is null there.)
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from umbrella_data.modality import find_modality
from umbrella_data.pipeline.config import AugmentConfig, PipelineSettings
from umbrella_train.config.data import DatasetConfig
from umbrella_train.config.run_config import RunConfig, StageConfig
from umbrella_train.config.schema import (
    allows_none,
    annotation_at,
    is_mapping,
    is_sequence,
    is_switch,
    section_of,
)
from umbrella_train.config.strict_yaml import parse_yaml

STAGE_SECTIONS = tuple(name for name in StageConfig.model_fields if name != "name")
"""What a stage can change."""

_NONE_WORDS = frozenset({"none", "null"})


@dataclass
class _Override:
    flag: str
    values: list[str] = field(default_factory=list)


def apply_overrides(
    content: dict[str, Any], *, overrides: Sequence[str], section: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """Apply overrides, the arguments of the command line, to a copy of a configuration's raw content.

    Each is `--dotted.key` (or `--dotted.key=value`), followed by as many values as the schema defines.

    Returns:
        The new content, and the problems.
    """
    content = _copied(content)
    found, problems = _split(overrides)
    # Those of single stages last: they take precedence.
    for override in sorted(found, key=lambda each: each.flag.partition(".")[0] == "stages"):
        try:
            path, value = _read(override, content=content, section=section)
            _set(content, path, value)
            for stage in stage_tables(content):
                path, value = _read(override, content=stage, section=section)
                if path[0] in STAGE_SECTIONS and _has(stage, path):
                    _set(stage, path, value)
        except ValueError as error:
            problems.append(f"--{override.flag}: {error}")
    return content, problems


def _copied(value: Any) -> Any:
    """A copy in which no two places share a table or list, as they do by a YAML alias."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def stage_tables(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `stages` in raw content; those that are no tables, which the schema rejects, are empty."""
    stages = content.get("stages")
    return [stage if isinstance(stage, dict) else {} for stage in stages] if isinstance(stages, list) else []


def _split(words: Sequence[str]) -> tuple[list[_Override], list[str]]:
    found: list[_Override] = []
    problems = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word[2:].partition("=")
            found.append(_Override(flag, [value] if equals else []))
        elif found:
            found[-1].values.append(word)
        else:
            problems.append(f"{word}: does not follow a --key")
    return found, problems


def _read(
    override: _Override, *, content: dict[str, Any], section: type[BaseModel]
) -> tuple[tuple[str | int, ...], Any]:
    path = _path(override.flag, content=content, section=section)
    annotation = annotation_at(section, path)
    if not override.values:
        last = str(path[-1])
        positive = (*path[:-1], last.removeprefix("no_"))
        # In a free table, which has no annotations, a flag without a value can only be a switch.
        meant = annotation_at(section, positive)
        if last.startswith("no_") and (meant is None or is_switch(meant)):
            return positive, False
    return path, _value(override.values, annotation)


def _path(flag: str, *, content: dict[str, Any], section: type[BaseModel]) -> tuple[str | int, ...]:
    path: list[str | int] = []
    here: Any = content
    for part in flag.split("."):
        parent = annotation_at(section, path)
        key: str | int
        if part.isdigit() and (is_sequence(parent) or isinstance(here, list)):
            key = int(part)
            here = here[key] if isinstance(here, list) and key < len(here) else None
        else:
            is_table_of_sections = is_mapping(parent) and annotation_at(section, [*path, part]) is not None
            key = table_key(part, here) if is_table_of_sections else part.replace("-", "_")
            here = here.get(key) if isinstance(here, dict) else None
        path.append(key)
    return tuple(path)


def table_key(name: str, table: Any) -> str:
    """Find the key of this modality in a table of modalities, whichever of its names the table uses."""
    if not isinstance(table, dict) or name in table:
        return name
    try:
        canonical = find_modality(name).name
        return next((key for key in table if find_modality(str(key)).name == canonical), name)
    except ValueError:
        return name


def _value(values: list[str], annotation: Any) -> Any:
    if len(values) == 1 and values[0].lower() in _NONE_WORDS and (annotation is None or allows_none(annotation)):
        return None
    if annotation is None:
        free = [_from_json(value) for value in values] or [True]
        return free[0] if len(free) == 1 else free
    if is_sequence(annotation):
        text = " ".join(values)
        return _from_flow_list(text) if text.startswith("[") else list(values)
    if not values and is_switch(annotation):
        return True
    if len(values) != 1:
        shown = f" ({' '.join(values)})" if values else ""
        raise ValueError(f"takes one value, {len(values)} given{shown}")
    if is_mapping(annotation) or section_of(annotation) is not None:
        return _from_json(values[0])
    return values[0]


def _from_flow_list(text: str) -> Any:
    """Read a list as in YAML or JSON, such as `[wandb]` or `[8, 8, 8]`."""
    found, problems = parse_yaml(text)
    if problems:
        raise ValueError(f"{text[:40]}: {'; '.join(problems)}")
    if not isinstance(found, list):
        raise ValueError(f"{text[:40]} is not a list; write [a, b], or a b")
    return found


def _from_json(text: str) -> Any:
    """Read a value of a free table: as JSON if it is valid JSON, otherwise as text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{text[:40]} is nested too deeply") from None
    except json.JSONDecodeError:
        return text


def _has(stage: dict[str, Any], path: Sequence[str | int]) -> bool:
    """Whether a stage has its own value at a path, or a value that replaces a table or list on the way to it."""
    here: Any = stage
    for part in path:
        if not isinstance(here, dict):
            return True
        if part not in here:
            return False
        here = here[part]
    return True


def _set(content: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    here: Any = content
    for position, part in enumerate(path):
        is_last = position == len(path) - 1
        if isinstance(part, int):
            if not isinstance(here, list) or part > len(here):
                raise ValueError(f"there is no entry {part}: the next free one is {len(here or [])}")
            if part == len(here):
                here.append(None)
        elif not isinstance(here, dict):
            raise ValueError(f"{'.'.join(map(str, path[:position]))} is a value without keys of its own")
        if is_last:
            here[part] = value
            return
        child = here[part] if isinstance(part, int) else here.get(part)
        if child is None:
            child = here[part] = [] if isinstance(path[position + 1], int) else {}
        here = child


def describe_keys(config: RunConfig) -> str:
    """List every key with its type, its meaning and its value in the configuration.

    Empty lists and tables are shown with a first entry, for its keys.
    """
    import tyro  # late: only --help needs it

    # In the terminal's encoding: tyro chooses characters for its boxes that it can show.
    text = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(RunConfig, default=_filled(config), args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    text.seek(0)
    _, _, keys = text.read().partition("\n\n")
    return keys


def _filled(config: RunConfig) -> RunConfig:
    """The configuration with an entry in each list and table of sections; only for display, because it is not valid."""
    from tyro import MISSING

    dataset = DatasetConfig.model_construct(manifest=MISSING, data_root=None, weight=1.0)
    entries = {
        "train": config.data.train or [dataset],
        "evaluation": config.data.evaluation or [dataset],
        "pipelines": {
            name: pipeline if pipeline.augment else pipeline.model_copy(update={"augment": AugmentConfig()})
            for name, pipeline in (
                config.data.pipelines or {next(iter(config.model.modalities)): PipelineSettings()}
            ).items()
        },
    }
    stages = config.stages or [StageConfig.model_construct(name=MISSING)]
    return config.model_copy(update={"data": config.data.model_copy(update=entries), "stages": stages})
