"""From a YAML file and overrides to a `RunConfig`, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from umbrella_data.cli.pipeline_options import PipelineOptions
from umbrella_train.config.overrides import apply_overrides
from umbrella_train.config.problems import ConfigError
from umbrella_train.config.run_checks import run_problems
from umbrella_train.config.run_config import RunConfig
from umbrella_train.config.stages import stage_configs, stage_problems, validate
from umbrella_train.config.strict_yaml import read_yaml


def demo_config_path() -> Path:
    """Return the packaged demo configuration."""
    return Path(str(files("umbrella_train") / "configs" / "demo.yaml"))


def load_config(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), *, to_run: bool = False
) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: A YAML file; None: the packaged demo.
        overrides: Arguments of the command line, as in `["--trainer.learning-rate", "1e-4"]`. They take precedence.
        to_run: Also check what a run needs here: transformers, the disk, the launched processes.

    Raises:
        ConfigError: With every problem of the file and of the overrides at once.
    """
    path = Path(path) if path is not None else demo_config_path()
    content, problems = read_yaml(path)
    if problems and not content:
        raise ConfigError(problems, source=str(path))
    content, override_problems = apply_overrides(content, overrides=overrides, section=RunConfig)
    problems += override_problems
    config, found = validate(content)
    if to_run:
        found += run_problems(content)
    problems += list(dict.fromkeys([*found, *stage_problems(content, known=found, to_run=to_run)]))
    if problems or config is None:
        raise ConfigError(problems, source=str(path))
    return config


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML that `load_config` reads back, with every default."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_pipeline_options(path: Path) -> PipelineOptions:
    """Read what `umbrella-data cache` and `preview` need from a run's file; its entry point is in pyproject.toml.

    Raises:
        ConfigError: With every problem of the file.
    """
    config = load_config(path)
    sources: list[tuple[Path, Path | None]] = []
    for each in [config, *stage_configs(config)]:
        if each.data.synthetic is None:
            datasets = [*each.data.train, *each.data.evaluation]
            sources += [(dataset.manifest, dataset.data_root) for dataset in datasets]
        else:
            sources += [(each.cohort_directory / name, None) for name in ("train.jsonl", "test.jsonl")]
    return PipelineOptions(
        configs=config.pipeline_configs,
        patch_sizes={name: modality.patch_size for name, modality in config.model.modalities.items()},
        sources=list(dict.fromkeys(sources)),
        cache_dir=config.data.cache_dir,
    )
