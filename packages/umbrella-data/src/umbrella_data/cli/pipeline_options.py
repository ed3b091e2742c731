"""Pipelines from words on a command line, or from the YAML file of a training run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbrella_data.modality import find_modality
from umbrella_data.pipeline.patch_grid import check_size, patch_grid

if TYPE_CHECKING:
    from pydantic import ValidationError

    from umbrella_data.pipeline.config import PipelineConfig


COHORT_NAME = "synthetic-cohort"
"""The folder beside the runs where the demo cohort lies, unless the run's file names another."""

_QUOTED = re.compile("'([^']+)'")


@dataclass
class PipelineOptions:
    """What is known of the pipelines of a run.

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
    """What words say, in place of what the file of a run says about the same modalities.

    Args:
        run: The YAML file of a training run; None for words alone.
        sizes: As in `options_from_words`, and so are the others.
        patches: Of the words' modalities or the run's.
        spacings: Of the words' modalities.
        settings: Of the words' modalities.

    Raises:
        ValueError: As `options_from_words` and `options_from_run`; also for a patch of a modality without a size.
    """
    words = options_from_words(sizes=sizes, patches=patches, spacings=spacings, settings=settings)
    known = options_from_run(run) if run is not None else PipelineOptions()
    known.configs |= words.configs
    known.patch_sizes |= words.patch_sizes
    for name in known.patch_sizes:
        if name not in known.configs:
            raise _without_size(name)
    return known


def check_patches(options: PipelineOptions, *, modalities: Iterable[str]) -> None:
    """Holds patches against the images that they cut.

    Args:
        options: With the patches.
        modalities: Those whose patches matter.

    Raises:
        ValueError: For a patch that does not divide its image.
    """
    for name in modalities:
        if name in options.patch_sizes:
            patch_grid(options.configs[name].image_size, options.patch_sizes[name], modality=name)


def options_from_words(
    *,
    sizes: Sequence[str],
    patches: Sequence[str] = (),
    spacings: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> PipelineOptions:
    """Pipelines from `MODALITY=...` words.

    Args:
        sizes: Such as `T1=96,96,96` or `rsfMRI=96,96,96,24`.
        patches: Such as `T1=16,16,16`.
        spacings: Such as `T1=2,2,2`, in mm.
        settings: Other keys of `PipelineConfig`, such as `rsfMRI.normalise=temporal_zscore`.

    Raises:
        ValueError: For a word that says nothing that a pipeline understands.
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
            raise ValueError(f"{word!r} is no setting; write MODALITY.KEY=VALUE, as in rsfMRI.short_series=pad")
        content.setdefault(find_modality(name).name, {})[key] = value
    for name, entries in content.items():
        if "image_size" not in entries:
            raise _without_size(name)
    return PipelineOptions(configs=_configs(content), patch_sizes=_numbers(patches, kind=int))


def options_from_run(path: Path) -> PipelineOptions:
    """Pipelines, manifests and cache of a training run's YAML file.

    Raises:
        ImportError: Without PyYAML.
        ValueError: Where the file is none of a run.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a run's YAML file needs PyYAML: pip install pyyaml; or give --size and manifests") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    try:
        modalities, data = content["model"]["modalities"], content.get("data") or {}
        settings = data.get("pipelines") or {}
        entries = {
            find_modality(name).name: {"image_size": each["image_size"], **(settings.get(name) or {})}
            for name, each in modalities.items()
        }
        patches = {find_modality(name).name: tuple(each["patch_size"]) for name, each in modalities.items()}
        named = [each for key in ("train", "evaluation") for each in data.get(key) or []]
        sources = [(Path(each["manifest"]), _path_or_none(each.get("data_root"))) for each in named]
        if (synthetic := data.get("synthetic")) is not None:
            directory = _path_or_none(synthetic.get("directory"))
            output_dir = Path(content.get("output_dir") or "runs")
            cohort = _cohort_folder(directory or output_dir / COHORT_NAME, run=path)
            sources += [(cohort / name, None) for name in ("train.jsonl", "test.jsonl")]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no run's configuration ({error!r}); it needs model.modalities with their "
                         "image_size and patch_size") from error  # fmt: skip
    return PipelineOptions(_configs(entries), patches, sources, _path_or_none(data.get("cache_dir")))


def _cohort_folder(stated: Path, *, run: Path) -> Path:
    """The synthetic cohort of a run: where its file says, or else beside the run's folder."""
    beside = run.resolve().parent.parent / COHORT_NAME
    return beside if beside.is_dir() and not stated.is_dir() else stated


def _without_size(name: str) -> ValueError:
    axes = "X,Y,Z,T" if find_modality(name).is_series else "X,Y,Z"
    return ValueError(f"{name} has no size; give --size {name}={axes}")


def _configs(content: Mapping[str, Mapping[str, Any]]) -> dict[str, PipelineConfig]:
    from pydantic import ValidationError

    from umbrella_data.pipeline.config import PipelineConfig

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
    """What pydantic says, in our words: the key with its modality, and what was meant."""
    from umbrella_data.pipeline.augment import AugmentConfig
    from umbrella_data.pipeline.config import PipelineConfig

    for each in error.errors(include_url=False):
        key = ".".join([name, *map(str, each["loc"])])
        if each["type"] == "extra_forbidden":
            fields = list((AugmentConfig if len(each["loc"]) > 1 else PipelineConfig).model_fields)
            meant = _meant(str(each["loc"][-1]), fields)
            yield f"{key}: no such key" + (meant or f"; known are {', '.join(fields)}")
        elif each["type"] == "literal_error":
            expected = each["ctx"]["expected"]
            yield f"{key} is {each['input']!r}; it must be {expected}{_meant(each['input'], _QUOTED.findall(expected))}"
        else:
            yield f"{key} is {each['input']!r}: {each['msg'].removeprefix('Value error, ')}"


def _meant(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _path_or_none(value: object) -> Path | None:
    return Path(str(value)).expanduser() if value is not None else None


def _numbers(words: Sequence[str], *, kind: type[int] | type[float]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[find_modality(name).name] = tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise ValueError(f"{word!r}: {error}; write MODALITY=NUMBER,NUMBER,..., as in T1=96,96,96") from error
    return found
