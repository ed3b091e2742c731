"""Scans that can be used but have a suspicious header or sidecar: all are counted, the first ones are listed."""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_data.scan.header import ScanWarning

MAX_LISTED = 1_000
"""Scans listed per code: a million may share one."""


@dataclass(frozen=True, order=True)
class ScanWithWarnings:
    """A scan with a warning.

    Attributes:
        files: Its files with the warning, its mask included. A warning about a sidecar is listed for its series.
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
        max_listed: Scans listed per code, the first ones by their files; all are counted.

    Attributes:
        counts: Number of scans by code.
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
            warnings: The codes of each of its files; files without any may be left out.
            subject: Its subject.
            modality: Its canonical name.
            manifests: The manifests that name it.
        """
        files: dict[str, list[str]] = defaultdict(list)
        for file, codes in warnings.items():
            for code in codes:
                files[str(code)].append(str(file))
        for code, names in files.items():
            self.counts[code] += 1
            # Sorted, so that the listed scans do not depend on the order of reading.
            insort(self._listed[code], ScanWithWarnings(tuple(names), subject, modality, tuple(map(str, manifests))))
            del self._listed[code][self.max_listed :]

    def listed(self, code: str) -> Sequence[ScanWithWarnings]:
        """The first scans of a code, by their files; at most `max_listed`."""
        return tuple(self._listed.get(code, ()))

    def rows(self, *, name: Callable[[str], str]) -> dict[str, Any]:
        """The list for JSON: for each code its meaning, the number of scans, and the first ones.

        Args:
            name: Writes the name of a subject or file: hashed, or in plain text.
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
