"""Output that several commands share: names or hashes, progress bars, lists of errors and warnings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbrella_data.errors import ScanError
    from umbrella_data.manifest.manifest import Manifest
    from umbrella_data.scan.shard import Shard
    from umbrella_data.scan.warnings import WarningList

_MAX_LINES = 50
# Often all scans of a scanner have the same warning.
_MAX_WARNINGS = 5
_NEARLY_ALL = 0.9


def choose_names(folder: Path, *, are_plain: bool) -> Callable[[str], str]:
    """How files in a folder, which is created, name subjects and scans: in plain text or by a hash."""
    from umbrella_data.privacy import pseudonyms

    folder.mkdir(parents=True, exist_ok=True)
    return str if are_plain else pseudonyms(folder)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="no progress and no messages, only warnings and errors")


def show_no_other_progress() -> None:
    """Keep the bars of Hugging Face's libraries hidden, which read this when they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def show(items: Iterable[Any], total: int, words: str, unit: str) -> Iterable[Any]:
    """Progress on stderr."""
    from umbrella_data.progress import progress_bar

    return progress_bar(items, total=total, words=words, unit=unit)


def print_shard(shard: Shard, *, num_scans: int, errors: Sequence[ScanError]) -> None:
    """Print what a shard has read, and its unusable scans."""
    print(f"shard {shard}: read {num_scans:,} scans, {len(errors):,} of them unusable; when all shards are done, run "
          "the same command with --merge instead of --shard")  # fmt: skip
    print_list(errors, rest="--merge lists all")


def print_list(items: Sequence[object], *, rest: str) -> None:
    """Print the first items, indented, and where to find the rest."""
    for item in items[:_MAX_LINES]:
        print(f"  {item}")
    if len(items) > _MAX_LINES:
        print(f"  and {len(items) - _MAX_LINES:,} more; {rest}")


def print_warnings(warnings: WarningList) -> None:
    """Print each code with its meaning, the number of scans, and the files of the first ones."""
    from umbrella_data.scan.header import ScanWarning

    if not warnings.counts:
        return
    print("\nwarnings about usable scans:")
    for code, count in warnings.counts.most_common():
        print(f"  {code}: {count:,} ({ScanWarning(code).meaning})")
        for scan in warnings.listed(code)[:_MAX_WARNINGS]:
            print(f"    {', '.join(scan.files)}")
        if count > _MAX_WARNINGS:
            print(f"    and {count - _MAX_WARNINGS:,} more; "
                  f"`umbrella-data check MANIFEST --out FOLDER` lists {warnings.max_listed:,} of a code")  # fmt: skip


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
        print(f"{len(lost):,} of {num_scans:,} scans are missing under {roots}: check --data-root")
