"""Prints warnings about usable scans."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbrella_data.scan.warnings import WarningList

# Often all scans of a scanner have the same warning.
_MAX_SHOWN = 5


def print_warnings(warnings: WarningList) -> None:
    """Print each code with its meaning, the number of scans, and the files of the first ones."""
    from umbrella_data.scan.header import ScanWarning

    if not warnings.counts:
        return
    print("\nwarnings about usable scans:")
    for code, count in warnings.counts.most_common():
        print(f"  {code}: {count:,} ({ScanWarning(code).meaning})")
        for scan in warnings.listed(code)[:_MAX_SHOWN]:
            print(f"    {', '.join(scan.files)}")
        if count > _MAX_SHOWN:
            print(f"    and {count - _MAX_SHOWN:,} more; "
                  f"`umbrella-data check MANIFEST --out FOLDER` lists {warnings.max_listed:,} of a code")  # fmt: skip
