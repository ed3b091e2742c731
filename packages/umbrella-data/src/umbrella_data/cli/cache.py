"""`umbrella-data cache`: fills the cache ahead of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from umbrella_data.cli.sources import (
    Commands,
    add_manifests,
    add_pipelines,
    add_workers,
    choose_configs,
    print_lost_root,
    show,
)

HELP = """\
Reads every scan of the manifests, prepares it as the run would, and keeps the result, so that training reads prepared
volumes from the first step on. Stopped and started again, it continues where it stopped.

  umbrella-data cache --config my.yaml
  umbrella-data cache train.jsonl --cache-dir /scratch/cache --size T1=96,96,96 --size rsfMRI=96,96,96,24"""
_MAX_SHOWN = 50


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "cache",
        help="prepare all scans ahead of a run",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_manifests(command, are_needed=False)
    add_pipelines(command)
    add_workers(command)
    command.add_argument("--cache-dir", type=Path, help="folder of the cache (default: the config's)")
    command.add_argument("--max-gb", type=float, help="size to keep the cache under, in 10^9 bytes (default: no limit)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Warm the cache, and list what cannot be prepared and how much was pushed out again."""
    from umbrella_data.cache.store import VolumeCache
    from umbrella_data.cli.pipeline_options import read_options
    from umbrella_data.jobs.warm_cache import warm_cache
    from umbrella_data.manifest.manifest import read_manifest
    from umbrella_data.pipeline.pipeline import Pipeline

    known = read_options(options.config, sizes=options.size, spacings=options.spacing, settings=options.set)
    directory = options.cache_dir or known.cache_dir
    sources = [(path, options.data_root) for path in options.manifests] or known.sources
    if directory is None or not sources or not known.configs:
        raise ValueError("manifests, --cache-dir and --size are needed, or a --config that has them")
    max_bytes = None if options.max_gb is None else int(options.max_gb * 1e9)
    configs = choose_configs(known.configs, options)
    cache = VolumeCache(directory, max_bytes=max_bytes)
    manifests = [read_manifest(path, data_root=root) for path, root in sources]
    report = warm_cache(
        manifests,
        pipelines={name: Pipeline(config, modality=name, cache=cache) for name, config in configs.items()},
        num_workers=options.workers,
        progress=lambda results, total: show(results, total, "preparing scans", "scan"),
    )
    if not report.num_scans:
        raise ValueError(f"no scan of {', '.join(configs)} to prepare in {', '.join(str(path) for path, _ in sources)}")
    num_prepared = report.num_scans - len(report.failed)
    has_lost = report.num_kept < num_prepared
    if has_lost:
        print(f"prepared {num_prepared:,} of {report.num_scans:,} scans; {report.num_kept:,} remain in {directory}, "
              f"the others were pushed out again under --max-gb {options.max_gb:g}: raise it")  # fmt: skip
    else:
        print(f"{num_prepared:,} of {report.num_scans:,} scans are in {directory}")
    for modality, count in report.passed_over.items():
        why = "which --modality leaves out" if modality in known.configs else "which has no --size"
        print(f"passed over: {count:,} scans of {modality}, {why}")
    for error in report.failed[:_MAX_SHOWN]:
        print(f"  {error}")
    if len(report.failed) > _MAX_SHOWN:
        print(f"  and {len(report.failed) - _MAX_SHOWN} more; `umbrella-data check` lists all")
    print_lost_root(report.failed, num_scans=report.num_scans, manifests=manifests)
    return 1 if report.failed or has_lost else 0
