"""What the terminal says about scans that can be used although something odd is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbrella_data.scan.warnings import WarningList

# Warnings change nothing, and often all scans of a scanner share one.
_MAX_SHOWN = 5


def print_warnings(warnings: WarningList) -> None:
    """Each code with the number of its scans and its meaning, and the files of the first ones."""
    from umbrella_data.scan.header import ScanWarning

    if not warnings.counts:
        return
    print("\nwarnings about scans that can be used:")
    for code, count in warnings.counts.most_common():
        print(f"  {code}: {count:,} ({ScanWarning(code).meaning})")
        for scan in warnings.listed(code)[:_MAX_SHOWN]:
            print(f"    {', '.join(scan.files)}")
        if count > _MAX_SHOWN:
            print(f"    and {count - _MAX_SHOWN:,} more; "
                  f"`umbrella-data check MANIFEST --out FOLDER` lists {warnings.max_listed:,} of a code")  # fmt: skip
