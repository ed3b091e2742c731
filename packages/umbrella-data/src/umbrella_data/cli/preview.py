"""`umbrella-data preview`: a page with pictures of what the model sees."""

from __future__ import annotations

import argparse
from pathlib import Path

from umbrella_data.cli.arguments import add_manifests, add_pipelines, choose_configs
from umbrella_data.cli.output import choose_names, print_lost_root, show

SUMMARY = "a page with pictures of what the model sees"
HELP = """\
Writes OUT/index.html and a PNG for some scans of each modality, as the model sees them: after the pipeline, in three
planes with orientation letters and the patch grid; a carpet plot for a series; FA and MD for dMRI. Below each picture
are its questions and answers, and the whole scan, to scroll through; OUT/viewer.js must stay next to the page.
The page has hashes of subjects and files unless --names is given; `umbrella-data whois HASH --in OUT` prints the name.

  umbrella-data preview --config my.yaml --out preview
  umbrella-data preview train.jsonl --size T1=96,96,96 --patch T1=16,16,16 --out preview"""

_LARGE_MB = 50
"""Browsers take seconds to open a page above this size."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_manifests(command, are_needed=False)
    add_pipelines(command)
    command.add_argument("--patch", action="append", default=[], metavar="MODALITY=X,Y,Z[,T]", help="patch size")
    command.add_argument("--out", type=Path, required=True, help="folder for index.html and its pictures")
    command.add_argument("--num", type=int, default=3, help="scans of each modality (3)")
    command.add_argument("--names", action="store_true", help="write names of subjects and files in plain text")


def run(options: argparse.Namespace) -> int:
    """Draw the scans and write the page."""
    from umbrella_data.cli.pipeline_options import read_options
    from umbrella_data.manifest.manifest import read_manifest
    from umbrella_data.pipeline.patch_grid import patch_grid
    from umbrella_data.pipeline.pipeline import Pipeline
    from umbrella_data.preview.page import write_preview

    known = read_options(
        options.config,
        sizes=options.size,
        patches=options.patch,
        spacings=options.spacing,
        settings=options.set,
    )
    sources = [(path, options.data_root) for path in options.manifests] or known.sources
    if not sources or not known.configs:
        raise ValueError("manifests and --size are needed, or a --config that has them")
    configs = choose_configs(known.configs, options)
    for name, config in configs.items():
        if name in known.patch_sizes:
            patch_grid(config.image_size, known.patch_sizes[name], modality=name)
    manifests = [read_manifest(path, data_root=root) for path, root in sources]
    report = write_preview(
        manifests,
        pipelines={name: Pipeline(config, modality=name) for name, config in configs.items()},
        patch_sizes=known.patch_sizes,
        folder=options.out,
        name=choose_names(options.out, are_plain=options.names),
        num_scans=options.num,
        progress=lambda scans: show(scans, len(scans), "drawing scans", "scan"),
    )
    for error in report.failed:
        print(f"cannot be shown: {error}")
    num_drawn = len(report.pictures) - len(report.failed)
    if num_drawn:
        size = report.page.stat().st_size / 1e6
        advice = f"; {size:,.0f} MB are slow to open: give a smaller --num or image size" if size > _LARGE_MB else ""
        print(f"wrote {report.page}, {num_drawn} pictures{advice}")
    else:
        print(f"no picture: none of the {len(report.failed)} scans can be shown; {report.page} lists them")
    print_lost_root(report.failed, num_scans=len(report.pictures), manifests=manifests)
    return 1 if report.failed else 0
