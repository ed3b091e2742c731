"""Stages of a run: the configuration of each, merged from the run's and the stage's own keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbrella_train.config.model import ModelConfig
from umbrella_train.config.overrides import STAGE_SECTIONS, stage_tables, table_key
from umbrella_train.config.problems import ConfigError, validation_problems
from umbrella_train.config.run_checks import run_problems
from umbrella_train.config.run_config import COHORT_NAME, RunConfig, name_problems
from umbrella_train.config.schema import annotation_at, is_mapping

WEIGHT_SOURCES = (
    "pretrained",
    "tokenizer",
    "vision_config",
    "text_config",
    "init",
    "language_model",
    "vision_encoder",
    "vision_num_heads",
    "vision_image_size",
    "vision_patch_size",
    "projector",
)
"""Keys of `model` that say where weights and words come from: a stage has them from the one before."""


def stage_configs(config: RunConfig, *, from_base: bool = False) -> list[RunConfig]:
    """The configuration of each stage, a run `OUTPUT_DIR/NAME/STAGE` of its own; empty without stages.

    Args:
        config: The run.
        from_base: Whether all stages start from the run's own weights, as for a dry run, in which none is trained.

    Raises:
        ConfigError: With the problems of all stages; `load_config` has reported them before.
    """
    problems: list[str] = []
    configs = []
    for number, content in enumerate(_stage_contents(config.model_dump(mode="json"), from_base=from_base)):
        stage, found = validate(content)
        problems += _at_stage(number, found)
        if stage is not None:
            configs.append(stage)
    if problems:
        raise ConfigError(problems, source=config.name)
    return configs


def stage_problems(content: Mapping[str, Any], *, known: Collection[str], to_run: bool) -> list[str]:
    """List the problems of all stages, each with its dotted path, without those of the run itself.

    Args:
        content: The raw content of the run's configuration, with overrides applied.
        known: The problems of the run itself.
        to_run: As of `load_config`.
    """
    names = [stage.get("name") for stage in stage_tables(content)]
    problems = [f"stages.{path}: {text}" for path, text in name_problems(names)]
    previous, before = None, None
    for number, stage in enumerate(_stage_contents(content)):
        config, found = validate(stage)
        if to_run:
            found += run_problems(stage, coming=previous)
        if before is not None and config is not None and config.model.pretrained == previous:
            found += _differences(before.model, config.model, name=before.name)
        problems += _at_stage(number, [problem for problem in found if problem not in known])
        previous, before = str(Path(stage["output_dir"]) / stage["name"] / "model"), config
    return problems


def _differences(before: ModelConfig, now: ModelConfig, *, name: str) -> Iterator[str]:
    """What a stage cannot change in the model of the one before, called `name`; otherwise found after its training."""
    trained, names = list(before.modalities), list(now.modalities)
    if names[: len(trained)] != trained:
        yield (
            f"model.modalities: they are {', '.join(trained)} in the stage {name}, from whose model this one starts, "
            f"and {', '.join(names)} here; keep them, and add new ones at the end"
        )
    for modality in (each for each in trained if each in names):
        reason = f"differs from that in the stage {name}, from whose model this one starts; keep it"
        if before.modalities[modality] != now.modalities[modality]:
            yield f"model.modalities.{modality}: {reason}"
        elif before.pool_size(modality) != now.pool_size(modality):
            yield f"model.pool.{modality}: {reason}"


def validate(content: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """The configuration with this content, None if it is not valid, and its problems."""
    try:
        return RunConfig.model_validate(content), []
    except ValidationError as error:
        return None, validation_problems(error, section=RunConfig)


def _at_stage(number: int, problems: Sequence[str]) -> list[str]:
    # Names are those of the run and of the list of stages, which are validated with the run.
    return [f"stages.{number}.{each}" for each in problems if not each.startswith(("name: ", "output_dir: "))]


def _stage_contents(content: Mapping[str, Any], *, from_base: bool = False) -> list[dict[str, Any]]:
    """The raw content of each stage's configuration; what is wrong in it is for the schema to report."""
    base = {key: value for key, value in content.items() if key != "stages"}
    output_dir = Path(str(content.get("output_dir", RunConfig.model_fields["output_dir"].default)))
    output_dir = output_dir.expanduser().absolute()
    top = output_dir / str(content.get("name", RunConfig.model_fields["name"].default))
    contents: list[dict[str, Any]] = []
    for stage in stage_tables(content):
        own = {key: stage[key] for key in STAGE_SECTIONS if key in stage and (key, stage[key]) != ("seed", None)}
        model, own_model = base.get("model"), own.get("model")
        has_weights = isinstance(own_model, dict) and "pretrained" in own_model
        start = base
        if contents and isinstance(model, dict) and not has_weights and not from_base:
            model = {key: value for key, value in model.items() if key not in WEIGHT_SOURCES}
            start = base | {"model": model | {"pretrained": str(top / contents[-1]["name"] / "model")}}
        place = {"name": str(stage.get("name")), "output_dir": str(top)}
        merged = _merged(start, own)
        data = merged.get("data")
        synthetic = data.get("synthetic") if isinstance(data, dict) else None
        if isinstance(synthetic, dict):  # one cohort for all stages
            cohort = {"directory": synthetic.get("directory") or str(output_dir / COHORT_NAME)}
            merged["data"] = {**merged["data"], "synthetic": synthetic | cohort}
        contents.append(place | {key: value for key, value in merged.items() if key not in place})
    return contents


def _merged(base: Mapping[str, Any], own: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A table with another one's values; tables are merged, other values replaced, modalities found by any name."""
    merged = dict(base)
    found: set[str] = set()
    for key, value in own.items():
        below = (*path, key)
        is_table = is_mapping(annotation_at(RunConfig, path)) and annotation_at(RunConfig, below) is not None
        name = table_key(key, base) if is_table and isinstance(key, str) else key
        # Two names of one modality in a stage stay two, for the schema to report.
        name = key if name in found or name in own else name
        found.add(name)
        before = base.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(before or {}, value, below) if both else value
    return merged
