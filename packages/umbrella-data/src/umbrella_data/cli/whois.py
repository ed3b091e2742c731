"""`umbrella-data whois`: the subject or file behind a hash."""

from __future__ import annotations

import argparse
from pathlib import Path

from umbrella_data.cli.sources import Commands

HELP = """\
Reports, lists and pages name subjects and files by a hash, salted anew for each folder. This finds the name again, on
the machine that holds the folder and the manifests.

  umbrella-data whois 3f9a0c --in runs/demo
  umbrella-data whois 3f9a0c --in preview --manifest train.jsonl"""


def add_command(commands: Commands) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "whois",
        help="the subject or file behind a hash",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("hash", help="the hash, or its first digits")
    command.add_argument("--in", dest="folder", type=Path, required=True, help="folder of the run, report or page")
    command.add_argument(
        "--manifest", action="append", type=Path, default=[], help="where to look (default: the run's)"
    )
    command.add_argument("--data-root", type=Path, help="folder that the manifests' paths are relative to")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the name."""
    from umbrella_data.manifest import read_manifest
    from umbrella_data.pipeline_options import options_from_run
    from umbrella_data.whois import who_is

    sources = [(path, options.data_root) for path in options.manifest]
    config = options.folder / "config.yaml"
    if not sources:
        if not config.is_file():
            raise ValueError(f"{options.folder} holds no config.yaml that names manifests; give --manifest")
        sources = options_from_run(config).sources
    if not sources:
        raise ValueError(f"{config} names no manifests; give --manifest")
    manifests = [read_manifest(path, data_root=root) for path, root in sources]
    print(who_is(options.hash, folder=options.folder, manifests=manifests))
    return 0
