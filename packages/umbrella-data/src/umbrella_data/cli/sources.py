"""Arguments that several commands share: manifests, the names of what they write, and progress."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbrella_data.modality import find_modality

if TYPE_CHECKING:
    from umbrella_data.errors import ScanError
    from umbrella_data.manifest.manifest import Manifest
    from umbrella_data.pipeline.config import PipelineConfig

Commands = Any

_NEARLY_ALL = 0.9


def add_manifests(command: argparse.ArgumentParser, *, are_needed: bool = True) -> None:
    """`MANIFEST...` and `--data-root`."""
    command.add_argument("manifests", type=Path, nargs="+" if are_needed else "*", metavar="MANIFEST")
    command.add_argument(
        "--data-root", type=Path, help="folder that the manifests' paths are relative to (default: each one's own)"
    )


def add_modalities(command: argparse.ArgumentParser) -> None:
    """`--modality`."""
    command.add_argument(
        "--modality",
        action="append",
        type=_modality,
        metavar="MODALITY",
        help="only this modality; may be repeated; other scans are counted (default: all)",
    )


def _modality(text: str) -> str:
    try:
        return find_modality(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_workers(command: argparse.ArgumentParser) -> None:
    """`--workers`."""
    command.add_argument("--workers", type=int, help="processes that read scans (default: one a core)")


def add_pipelines(command: argparse.ArgumentParser) -> None:
    """`--config`, `--size`, `--spacing`, `--set` and `--modality`."""
    command.add_argument("--config", type=Path, help="YAML file of a training run: its sizes, pipelines and manifests")
    command.add_argument("--size", action="append", default=[], metavar="MODALITY=X,Y,Z[,T]", help="image size")
    command.add_argument("--spacing", action="append", default=[], metavar="MODALITY=X,Y,Z", help="voxel size in mm")
    command.add_argument(
        "--set", action="append", default=[], metavar="MODALITY.KEY=VALUE", help="another key of the pipeline"
    )
    add_modalities(command)


def choose_configs(configs: Mapping[str, PipelineConfig], options: argparse.Namespace) -> dict[str, PipelineConfig]:
    """The pipelines selected by `--modality`.

    Raises:
        ValueError: For a modality without a pipeline.
    """
    chosen = list(configs) if options.modality is None else options.modality
    if without := [name for name in chosen if name not in configs]:
        raise ValueError(f"{', '.join(without)} has no size; give --size, or remove it from --modality")
    return {name: config for name, config in configs.items() if name in chosen}


def read_manifests(options: argparse.Namespace) -> list[Manifest]:
    """The manifests that were named."""
    from umbrella_data.manifest.manifest import read_manifest

    return [read_manifest(path, data_root=options.data_root) for path in options.manifests]


def print_lost_root(errors: Sequence[ScanError], *, num_scans: int, manifests: Sequence[Manifest]) -> None:
    """Suggest checking `--data-root` if nearly all scans are missing.

    Args:
        errors: Errors of unusable scans.
        num_scans: Number of all scans.
        manifests: Their manifests.
    """
    from umbrella_data.files.paths import is_lost

    lost = [error for error in errors if is_lost(error)]
    if lost and len(lost) >= _NEARLY_ALL * num_scans:
        roots = ", ".join(dict.fromkeys(str(manifest.data_root) for manifest in manifests))
        print(f"{len(lost):,} of {num_scans:,} scans are missing under {roots}: "
              "check --data-root")  # fmt: skip


def choose_names(folder: Path, *, are_plain: bool) -> Callable[[str], str]:
    """How a file in a folder, which is created, names subjects and files: in plain text or by a hash."""
    from umbrella_data.privacy import pseudonyms

    folder.mkdir(parents=True, exist_ok=True)
    return str if are_plain else pseudonyms(folder)


def show(items: Iterable[Any], total: int, words: str, unit: str) -> Iterable[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=words, unit=unit)
