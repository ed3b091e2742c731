"""Pipelines from words on a command line, or from the YAML file of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbrella_data.modality import find_modality

if TYPE_CHECKING:
    from umbrella_data.transforms import PipelineConfig


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
    content: dict[str, dict[str, Any]] = {
        name: {"image_size": values} for name, values in _numbers(sizes, kind=int).items()
    }
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
            raise ValueError(f"{name} has no size; give --size {name}=X,Y,Z")
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
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no run's configuration ({error!r}); it needs model.modalities with their "
                         "image_size and patch_size") from error  # fmt: skip
    return PipelineOptions(_configs(entries), patches, sources, _path_or_none(data.get("cache_dir")))


def _configs(content: Mapping[str, Mapping[str, Any]]) -> dict[str, PipelineConfig]:
    from umbrella_data.transforms import PipelineConfig

    return {name: PipelineConfig.model_validate(entries) for name, entries in content.items()}


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
