"""From a YAML file and overrides to a `RunConfig`, and back to YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from umbrella_train.config.model import by_canonical_name
from umbrella_train.config.overrides import apply_overrides
from umbrella_train.config.problems import ConfigError, as_text, validation_problems
from umbrella_train.config.run_checks import run_problems
from umbrella_train.config.run_config import RunConfig, pipeline_problems
from umbrella_train.config.section import SectionError
from umbrella_train.config.strict_yaml import read_yaml, remove_secrets


def demo_config_path() -> Path:
    """Return the packaged demo configuration."""
    return Path(str(files("umbrella_train") / "configs" / "demo.yaml"))


def load_config(path: Path | None, overrides: Sequence[str] = (), *, to_run: bool = False) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: A YAML file; None: the packaged demo.
        overrides: The command line's words, as in `["--trainer.learning-rate", "1e-4"]`. They win over the file.
        to_run: Also hold it against what a run would meet here: transformers, the disk, the processes launched.

    Raises:
        ConfigError: With every problem of the file and of the overrides at once.
    """
    path = path if path is not None else demo_config_path()
    content, problems = read_yaml(path)
    if problems and not content:
        raise ConfigError(problems, source=str(path))
    content, override_problems = apply_overrides(content, overrides=overrides, section=RunConfig)
    content, secret_problems = remove_secrets(content)
    problems += override_problems + secret_problems
    config, schema_problems = _validate(content)
    problems += schema_problems
    if to_run:
        problems += run_problems(content)
    if problems or config is None:
        raise ConfigError(problems, source=str(path))
    return config


def _validate(content: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """Validate, again and again without what was wrong: a section that has an error is else not checked as a whole."""
    problems: list[str] = []
    taken_out: set[tuple[str, ...]] = set()
    rest = content
    while True:
        try:
            return RunConfig.model_validate(rest), problems
        except ValidationError as error:
            found = validation_problems(error, section=RunConfig, taken_out=taken_out)
            paths = {_path_within(rest, details["loc"]): details["type"] for details in error.errors()}
        problems += [text for text in found if text not in problems]
        paths.pop((), None)
        if not paths:
            return None, problems + [text for text in _pipeline_problems(content) if text not in problems]
        # Nothing depends on an unknown key.
        taken_out |= {as_text(path) for path, kind in paths.items() if kind != "extra_forbidden"}
        rest = _without(rest, paths)


def _path_within(content: Any, location: Sequence[str | int]) -> tuple[str | int, ...]:
    """The part of an error's location that is there: the wrong value, the table that lacks a key, or the whole list."""
    here, path = content, []
    for part in location:
        is_there = part in here if isinstance(here, dict) else isinstance(here, list) and isinstance(part, int)
        if not is_there:
            break
        here = here[part]
        path.append(part)
    # Without one of its entries a list would number the others anew.
    while path and isinstance(path[-1], int):
        path.pop()
    return tuple(path)


def _without(content: dict[str, Any], paths: Iterable[tuple[str | int, ...]]) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for path in sorted(paths, key=len, reverse=True):  # what is below first
        section: Any = content
        for part in path[:-1]:
            section = section[part]
        del section[path[-1]]
    return content


def _pipeline_problems(content: dict[str, Any]) -> list[str]:
    """The one problem between sections, from names alone: where a section is wrong, its values are not to be had."""
    named = []
    for section, key in (("data", "pipelines"), ("model", "modalities")):
        table = content.get(section)
        entries = table.get(key) if isinstance(table, dict) else None
        named.append({str(name): None for name in entries} if isinstance(entries, dict) else {})
    try:
        pipelines, modalities = map(by_canonical_name, named)
    except SectionError:
        return []  # told already
    found = pipeline_problems(pipelines, modalities=modalities) if modalities else []
    return [f"{problem.key}: {problem.message}" for problem in found]


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML that `load_config` reads back, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
