"""Arguments that several commands share: manifests, the names of what they write, and progress."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbrella_data.manifest import Manifest

Commands = Any


def add_manifests(command: argparse.ArgumentParser, *, are_needed: bool = True) -> None:
    """`MANIFEST...` and `--data-root`."""
    command.add_argument("manifests", type=Path, nargs="+" if are_needed else "*", metavar="MANIFEST")
    command.add_argument(
        "--data-root", type=Path, help="folder that the manifests' paths are relative to (default: each one's own)"
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    """`--workers`."""
    command.add_argument("--workers", type=int, help="processes that read scans (default: one a core)")


def add_pipelines(command: argparse.ArgumentParser) -> None:
    """`--config`, `--size`, `--spacing` and `--set`."""
    command.add_argument("--config", type=Path, help="YAML file of a training run: its sizes, pipelines and manifests")
    command.add_argument("--size", action="append", default=[], metavar="MODALITY=X,Y,Z[,T]", help="image size")
    command.add_argument("--spacing", action="append", default=[], metavar="MODALITY=X,Y,Z", help="voxel size in mm")
    command.add_argument(
        "--set", action="append", default=[], metavar="MODALITY.KEY=VALUE", help="another key of the pipeline"
    )


def read_manifests(options: argparse.Namespace) -> list[Manifest]:
    """The manifests that were named."""
    from umbrella_data.manifest import read_manifest

    return [read_manifest(path, data_root=options.data_root) for path in options.manifests]


def name_by_hash(folder: Path, *, in_clear: bool) -> Callable[[str], str]:
    """How a file in a folder names subjects and files; the salt of the hashes is kept in the folder."""
    if in_clear:
        return str
    from umbrella_data.bad_scans import SALT_NAME
    from umbrella_data.privacy import name_hasher, read_or_create_salt

    folder.mkdir(parents=True, exist_ok=True)
    return name_hasher(read_or_create_salt(folder / SALT_NAME))


def show(items: Iterable[Any], total: int, words: str, unit: str) -> Iterable[Any]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=words, unit=unit)
