"""`umbrella-data cache`: fills the cache ahead of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from umbrella_data.cli.arguments import add_manifests, add_pipelines, add_shard, add_workers, choose_configs
from umbrella_data.cli.output import print_list, print_lost_root, show

SUMMARY = "preprocess all scans ahead of a run"
HELP = """\
Reads every scan of the manifests, preprocesses it as the run would, and stores the result in the cache: training then
reads preprocessed volumes from the first step. If it was stopped, start it again: it continues where it stopped.
--shard I/N prepares one of N parts of the subjects; the shards may run at the same time, and need no --merge.

  umbrella-data cache --config my.yaml
  umbrella-data cache train.jsonl --cache-dir /scratch/cache --size T1=96,96,96 --size rsfMRI=96,96,96,24"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_manifests(command, are_needed=False)
    add_pipelines(command)
    add_workers(command)
    add_shard(command, needs_merge=False)
    command.add_argument("--cache-dir", type=Path, help="folder of the cache (default: the config's)")
    command.add_argument("--max-gb", type=float, help="maximum size of the cache in 10^9 bytes (default: no limit)")


def run(options: argparse.Namespace) -> int:
    """Fill the cache; print unusable scans and how many were evicted."""
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
        shard=options.shard,
        progress=lambda results, total: show(results, total, "preprocessing scans", "scan"),
    )
    if not report.has_scans:
        raise ValueError(f"no scan of {', '.join(configs)} in {', '.join(str(path) for path, _ in sources)}")
    num_prepared = report.num_scans - len(report.failed)
    has_lost = report.num_kept < num_prepared
    if has_lost:
        print(f"preprocessed {num_prepared:,} of {report.num_scans:,} scans; {report.num_kept:,} remain in "
              f"{directory}, the others were evicted: raise --max-gb {options.max_gb:g}")  # fmt: skip
    else:
        print(f"{num_prepared:,} of {report.num_scans:,} scans are in {directory}")
    for modality, count in report.skipped.items():
        why = "not selected by --modality" if modality in known.configs else "no --size"
        print(f"skipped: {count:,} scans of {modality}, {why}")
    print_list(report.failed, rest="`umbrella-data check` lists all")
    print_lost_root(report.failed, num_scans=report.num_scans, manifests=manifests)
    return 1 if report.failed or has_lost else 0
