"""From a YAML file and overrides to a `RunConfig`, and back to YAML."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from umbrella_train.config.overrides import apply_overrides
from umbrella_train.config.problems import ConfigError, validation_problems
from umbrella_train.config.run_checks import run_problems
from umbrella_train.config.run_config import RunConfig
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
    """Validate, unknown keys taken out on the way: a section that has one would else not be checked as a whole."""
    problems: list[str] = []
    while True:
        try:
            return RunConfig.model_validate(content), problems
        except ValidationError as error:
            problems += [text for text in validation_problems(error, section=RunConfig) if text not in problems]
            unknown = [details["loc"] for details in error.errors() if details["type"] == "extra_forbidden"]
        if not unknown:
            return None, problems
        content = copy.deepcopy(content)
        for path in unknown:
            section: Any = content
            for part in path[:-1]:
                section = section[part]
            del section[path[-1]]


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML that `load_config` reads back, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
