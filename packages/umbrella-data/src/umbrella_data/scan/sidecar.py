"""The repetition time of a series, from its BIDS sidecar and its header, which are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from umbrella_data.errors import ScanError
from umbrella_data.files.paths import applicable_files, open_regular_file, stays_in_tree
from umbrella_data.scan.header import REPETITION_TIME_LIMITS, ScanHeader, ScanWarning

_MAX_BYTES = 1 << 22
# Headers have float32, or three digits if written by hand.
_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class RepetitionTime:
    """Seconds from frame to frame, from header and sidecar.

    Attributes:
        seconds: The sidecar's if it has one, as BIDS demands; otherwise the header's; None if neither has one.
        warnings: `sidecar` if the sidecar cannot be used, or is inherited and a link out of its BIDS tree;
            `sidecar_repetition_time` if it differs from the header by more than 0.5 %.
    """

    seconds: float | None
    warnings: tuple[ScanWarning, ...] = ()


def repetition_time(path: str | PathLike[str], header: ScanHeader) -> RepetitionTime:
    """The repetition time of a series.

    Args:
        path: The series; its sidecar is next to it, or in a folder above by BIDS' inheritance principle.
        header: Its header.
    """
    known = header.repetition_time
    for sidecar in sidecar_files(path):
        try:
            content = read_json_object(sidecar) if stays_in_tree(sidecar, Path(path)) else None
        except (ScanError, ValueError):
            content = None
        if content is None:
            return RepetitionTime(seconds=known, warnings=(ScanWarning.SIDECAR,))
        if "RepetitionTime" in content:
            return _compared(content["RepetitionTime"], known)
    return RepetitionTime(seconds=known)


def sidecar_files(path: str | PathLike[str]) -> Iterator[Path]:
    """The existing sidecars of a scan, by decreasing precedence (BIDS, "The inheritance principle")."""
    return applicable_files(Path(path), ".json")


def read_json_object(
    path: Path, *, to_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, object]:
    """The content of a JSON file of at most 4 MiB, such as a sidecar.

    Args:
        path: The file.
        to_object: Builds each object from its keys and values, and may raise a `ValueError`; None builds a `dict`.

    Raises:
        ScanError: If the file cannot be opened or read.
        ValueError: If it is larger, or is no JSON object.
    """
    with open_regular_file(str(path)) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES} bytes")
    try:
        value = json.loads(content, object_pairs_hook=to_object)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _compared(value: object, known: float | None) -> RepetitionTime:
    low, high = REPETITION_TIME_LIMITS
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return RepetitionTime(seconds=known, warnings=(ScanWarning.SIDECAR,))
    is_other = known is not None and not math.isclose(known, value, rel_tol=_TOLERANCE)
    return RepetitionTime(seconds=float(value), warnings=(ScanWarning.SIDECAR_REPETITION_TIME,) if is_other else ())
