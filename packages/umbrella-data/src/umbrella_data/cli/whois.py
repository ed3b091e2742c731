"""`umbrella-data whois`: the subject or file behind a hash."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.cli.sources import Commands

if TYPE_CHECKING:
    from umbrella_data.manifest.manifest import Manifest

HELP = """\
Reports, lists and pages name subjects and files by a hash, salted anew for each folder. This finds the name again, on
the machine that holds the folder and the manifests. Without --in, the folders here and in ./runs are searched that hold
a salt, the newest first.

  umbrella-data whois 3f9a0c
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
    command.add_argument("--in", dest="folder", type=Path, help="folder of the run, report or page")
    command.add_argument(
        "--manifest", action="append", type=Path, default=[], help="where to look (default: the run's)"
    )
    command.add_argument("--data-root", type=Path, help="folder that the manifests' paths are relative to")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the name."""
    from umbrella_data.jobs.pseudonym_lookup import who_is

    if options.folder is None:
        return _search(options)
    print(who_is(options.hash, folder=options.folder, manifests=_manifests(options.folder, options)))
    return 0


def _search(options: argparse.Namespace) -> int:
    """Print the name that the newest folder gives."""
    from umbrella_data.errors import ManifestError
    from umbrella_data.jobs.pseudonym_lookup import NameNotFoundError, salted_folders, who_is

    folders = salted_folders(Path())
    if not folders:
        raise ValueError(f"no folder with a salt in {Path.cwd()} or its runs; give the folder of the run, report or "
                         "page with --in")  # fmt: skip
    searched = []
    for folder in folders:
        try:
            name = who_is(options.hash, folder=folder, manifests=_manifests(folder, options))
        except NameNotFoundError:
            searched.append(f"{folder}: no subject, scan or manifest has it")
        except ManifestError as error:
            searched.append(f"{folder}: {error.path}: {'; '.join(error.problems)}")
        except (ValueError, OSError) as error:  # no manifests, or the salt of somebody else: the path is named
            searched.append(str(error))
        else:
            print(name)
            print(f"found with the salt of {folder}", file=sys.stderr)
            return 0
    raise NameNotFoundError("\n  ".join([f"{options.hash} is not found; searched, the newest first:", *searched]))


def _manifests(folder: Path, options: argparse.Namespace) -> list[Manifest]:
    """The manifests that were named, or those of the run.

    Raises:
        ManifestError: For one that cannot be read.
        ValueError: Where none is named.
    """
    from umbrella_data.cli.pipeline_options import options_from_run
    from umbrella_data.manifest.manifest import read_manifest

    sources = [(path, options.data_root) for path in options.manifest]
    config = folder / "config.yaml"
    if not sources:
        if not config.is_file():
            raise ValueError(f"{folder} holds no config.yaml that names manifests; give --manifest")
        sources = options_from_run(config).sources
    if not sources:
        raise ValueError(f"{config} names no manifests; give --manifest")
    return [read_manifest(path, data_root=root) for path, root in sources]
