"""Arguments that several commands share: manifests, modalities and pipelines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.modality import find_modality

if TYPE_CHECKING:
    from umbrella_data.pipeline.config import PipelineConfig
    from umbrella_data.scan.shard import ScanParts, Shard


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
    command.add_argument("--workers", type=int, help="processes that read scans (default: one per core)")


def add_shard(command: argparse.ArgumentParser, *, needs_merge: bool = True) -> None:
    """`--shard` and, unless the shards of the command are independent, `--merge`."""
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only the scans of part I of N of the subjects, I from 1 to N: $SLURM_ARRAY_TASK_ID/N in a job array",
    )
    if needs_merge:
        group.add_argument("--merge", action="store_true", help="read no scan, but the results of all shards")


def choose_parts(options: argparse.Namespace, *, command: str) -> ScanParts | None:
    """Where the results of shards are, below --out; None without `--shard` and `--merge`."""
    from umbrella_data.scan.shard import ScanParts

    if options.shard is None and not options.merge:
        return None
    return ScanParts(options.out / f"shards-of-{command}", options.shard)


def _shard(text: str) -> Shard:
    from umbrella_data.scan.shard import parse_shard

    try:
        return parse_shard(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_b_limits(command: argparse.ArgumentParser) -> None:
    """`--max-b` and `--b0-threshold`; their defaults are those of a pipeline."""
    command.add_argument(
        "--max-b", type=float, default=1500.0, help="largest b-value that a tensor is fitted on, in s/mm2 (1500)"
    )
    command.add_argument(
        "--b0-threshold", type=float, default=50.0, help="largest b-value of a b0 volume, in s/mm2 (50)"
    )


def add_non_finite(command: argparse.ArgumentParser) -> None:
    """`--non-finite`; its default is that of a pipeline."""
    command.add_argument(
        "--non-finite",
        choices=("reject", "outside_mask", "zero"),
        default="outside_mask",
        help="NaN and infinite voxels: reject the scan, read those outside of its mask as 0, or read all as 0",
    )


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
