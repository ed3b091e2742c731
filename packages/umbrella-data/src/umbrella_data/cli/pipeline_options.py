"""Pipelines from command-line options, or from the configuration file of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from umbrella_data.errors import did_you_mean
from umbrella_data.modality import find_modality
from umbrella_data.pipeline.config import AugmentConfig, PipelineConfig
from umbrella_data.pipeline.patch_grid import check_size

ENTRY_POINTS = "umbrella_data.run_config"
"""Group of the function that reads a run's file: from its path to `PipelineOptions`. umbrella_train provides one."""


@dataclass
class PipelineOptions:
    """Pipelines, manifests and cache of a run.

    Attributes:
        configs: By modality.
        patch_sizes: Voxels (and frames) of a patch, by modality.
        sources: Manifests of the run, each with its data_root or None.
        cache_dir: The run's cache.
    """

    configs: dict[str, PipelineConfig] = field(default_factory=dict)
    patch_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sources: list[tuple[Path, Path | None]] = field(default_factory=list)
    cache_dir: Path | None = None


def read_options(
    run: Path | None,
    *,
    sizes: Sequence[str],
    patches: Sequence[str] = (),
    spacings: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> PipelineOptions:
    """Options of the command line, which take precedence over the run's file for the same modalities.

    Args:
        run: The configuration file of a training run, or None.
        sizes: Such as `T1=96,96,96` or `rsfMRI=96,96,96,24`.
        patches: Such as `T1=16,16,16`, also of modalities of the run.
        spacings: Such as `T1=2,2,2`, in mm.
        settings: Other keys of `PipelineConfig`, such as `rsfMRI.normalise=temporal_zscore`.

    Raises:
        ValueError: For an option that is not in this form, an unknown key, an invalid value, or a modality without a
            size. As `options_from_run`.
    """
    content: dict[str, dict[str, Any]] = {}
    for name, size in _numbers(sizes, kind=int).items():
        check_size(size, what="an image size", modality=name)
        content[name] = {"image_size": size}
    for name, values in _numbers(spacings, kind=float).items():
        content.setdefault(name, {})["spacing"] = values
    for word in settings:
        place, _, value = word.partition("=")
        name, _, key = place.partition(".")
        if not key or not value:
            raise ValueError(f"{word!r} is not a setting; write MODALITY.KEY=VALUE, as in rsfMRI.short_series=pad")
        content.setdefault(find_modality(name).name, {})[key] = value
    known = options_from_run(run) if run is not None else PipelineOptions()
    known.patch_sizes |= _numbers(patches, kind=int)
    without = [name for name, entries in content.items() if "image_size" not in entries]
    without += [name for name in known.patch_sizes if name not in known.configs and name not in content]
    for name in without:
        axes = "X,Y,Z,T" if find_modality(name).is_series else "X,Y,Z"
        raise ValueError(f"{name} has no size; give --size {name}={axes}")
    known.configs |= _configs(content)
    return known


def options_from_run(path: Path) -> PipelineOptions:
    """Pipelines, manifests and cache of a training run's configuration file.

    Raises:
        OSError: If the file cannot be opened.
        ImportError: Without umbrella_train.
        ValueError: With every problem of the configuration.
    """
    path.open().close()
    for entry_point in entry_points(group=ENTRY_POINTS):
        options: PipelineOptions = entry_point.load()(path)
        return options
    raise ImportError(f"{path}: reading a run's configuration requires umbrella-train: install it, or give manifests "
                      "and --size instead")  # fmt: skip


def _configs(content: Mapping[str, Mapping[str, Any]]) -> dict[str, PipelineConfig]:
    configs: dict[str, PipelineConfig] = {}
    problems: list[str] = []
    for name, entries in content.items():
        try:
            configs[name] = PipelineConfig.model_validate(entries)
        except ValidationError as error:
            problems += _problems(error, name=name)
    if problems:
        raise ValueError("\n  ".join(problems))
    return configs


def _problems(error: ValidationError, *, name: str) -> Iterator[str]:
    """Problems as sentences: the key with its modality, what is wrong, and similar words."""
    for each in error.errors(include_url=False):
        key, last = ".".join([name, *map(str, each["loc"])]), each["loc"][-1] if each["loc"] else ""
        section: type[BaseModel] = AugmentConfig if len(each["loc"]) > 1 else PipelineConfig
        if each["type"] == "extra_forbidden":
            fields = section.model_fields
            yield f"{key}: no such key" + (did_you_mean(last, fields) or f"; known are {', '.join(fields)}")
        elif each["type"] == "literal_error":
            choices = get_args(section.model_fields[str(last)].annotation)
            meant = did_you_mean(each["input"], choices)
            yield f"{key} is {each['input']!r}; it must be {each['ctx']['expected']}{meant}"
        else:
            yield f"{key} is {each['input']!r}: {each['msg'].removeprefix('Value error, ')}"


def _numbers(words: Sequence[str], *, kind: type[int] | type[float]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[find_modality(name).name] = tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise ValueError(f"{word!r}: {error}; write MODALITY=NUMBER,NUMBER,..., as in T1=96,96,96") from error
    return found
