"""Lists of usable scans with warnings: all are counted, the first ones listed."""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_data.scan.header import ScanWarning

MAX_LISTED = 1_000
"""Most scans listed for a code."""


@dataclass(frozen=True, order=True)
class ScanWithWarnings:
    """A usable scan with warnings.

    Attributes:
        files: Files with the warning: its own, or its mask. Warnings about a sidecar are listed with the series.
        subject: Its subject.
        modality: Its canonical name.
        manifests: The manifests that name it.
    """

    files: tuple[str, ...]
    subject: str
    modality: str
    manifests: tuple[str, ...] = ()


class WarningList:
    """Warnings by their codes, see `umbrella_data.scan.header.ScanWarning`.

    Args:
        max_listed: Most scans listed for a code, the first ones by path; all are counted.

    Attributes:
        counts: Scans by code, each once.
    """

    def __init__(self, *, max_listed: int = MAX_LISTED) -> None:
        self.max_listed = max_listed
        self.counts: Counter[str] = Counter()
        self._listed: dict[str, list[ScanWithWarnings]] = defaultdict(list)

    def add(
        self,
        warnings: Mapping[Path, Iterable[str]],
        *,
        subject: str,
        modality: str,
        manifests: Sequence[Path] = (),
    ) -> None:
        """Add a scan.

        Args:
            warnings: Codes by file; files without warnings may be absent.
            subject: Its subject.
            modality: Its canonical name.
            manifests: The manifests that name it.
        """
        files: dict[str, list[str]] = defaultdict(list)
        for file, codes in warnings.items():
            for code in codes:
                files[str(code)].append(str(file))
        for code, at_fault in files.items():
            self.counts[code] += 1
            # Sorted, so that the list does not depend on the order of reading.
            insort(self._listed[code], ScanWithWarnings(tuple(at_fault), subject, modality, tuple(map(str, manifests))))
            del self._listed[code][self.max_listed :]

    def listed(self, code: str) -> Sequence[ScanWithWarnings]:
        """The first scans of a code, by their files; at most `max_listed`."""
        return tuple(self._listed.get(code, ()))

    def rows(self, *, name: Callable[[str], str]) -> dict[str, Any]:
        """The list for JSON: for each code its meaning, the number of scans, and the first ones.

        Args:
            name: Function that names subjects and files, in plain text or by a hash.
        """
        return {
            code: {
                "meaning": ScanWarning(code).meaning,
                "num_scans": count,
                "num_listed": len(self.listed(code)),
                "scans": [
                    {
                        "files": [name(file) for file in scan.files],
                        "subject": name(scan.subject),
                        "modality": scan.modality,
                        "manifests": [name(manifest) for manifest in scan.manifests],
                    }
                    for scan in self.listed(code)
                ],
            }
            for code, count in sorted(self.counts.items())
        }
