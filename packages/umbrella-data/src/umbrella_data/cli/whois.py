"""`umbrella-data whois`: the subject or file behind a hash."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "the subject or file behind a hash"
HELP = """\
Reports, lists and pages name subjects and files by a hash, with a salt for each folder. This command finds the name in
the table that the folder keeps next to its salt (names.jsonl, readable by its owner only). Without --in, the folders
here and in ./runs that have such a table are searched, the newest first.

  umbrella-data whois 3f9a0c
  umbrella-data whois 3f9a0c --in runs/demo"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument("hash", help="the hash, or its first digits")
    command.add_argument("--in", dest="folder", type=Path, help="folder of the run, report or page")


def run(options: argparse.Namespace) -> int:
    """Print the name."""
    from umbrella_data.privacy import folders_with_names, who_is

    folders = folders_with_names(Path()) if options.folder is None else [options.folder]
    name, folder = who_is(options.hash, folders=folders)
    print(name)
    if options.folder is None and not options.quiet:
        print(f"found in the table of {folder}", file=sys.stderr)
    return 0
