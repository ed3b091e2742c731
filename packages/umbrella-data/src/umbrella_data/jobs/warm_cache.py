"""The cache filled ahead of a run: every scan of some manifests prepared once, in parallel, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from umbrella_data.errors import ScanError
from umbrella_data.files.parallel import map_unordered
from umbrella_data.manifest.sample import Scan
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.scan.diffusion import check_dipy, needs_fit

if TYPE_CHECKING:
    from umbrella_data.manifest.manifest import Manifest


@dataclass
class WarmReport:
    """What became of the scans.

    Attributes:
        num_scans: All of them.
        num_kept: Those that are in the cache in the end: a size limit may have pushed others out again.
        failed: Why each other one cannot be used.
        passed_over: Scans without a pipeline, by modality.
    """

    num_scans: int = 0
    num_kept: int = 0
    failed: list[ScanError] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)


def warm_cache(
    manifests: Sequence[Manifest],
    *,
    pipelines: Mapping[str, Pipeline],
    num_workers: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,  # noqa: ARG005
) -> WarmReport:
    """Put every scan into the cache of its pipeline. What is there already is not made again, so that it can go on.

    Args:
        manifests: The samples.
        pipelines: By modality, each with a cache.
        num_workers: Processes; None for as many as there are cores.
        progress: Wraps the results, as tqdm does; called with their number.

    Raises:
        ManifestError: For a row that cannot be read.
        ValueError: For a pipeline without a cache.
        ImportError: If a DWI must be fitted and dipy is missing, before a scan is read.
    """
    bare = sorted(name for name, pipeline in pipelines.items() if pipeline.cache is None)
    if bare:
        raise ValueError(f"the pipelines of {', '.join(bare)} have no cache to warm")
    scans = dict.fromkeys(scan for manifest in manifests for sample in manifest for scan in sample.scans)
    report = WarmReport()
    chosen = []
    for scan in scans:
        if scan.modality in pipelines:
            chosen.append(scan)
        else:
            report.passed_over[scan.modality] = report.passed_over.get(scan.modality, 0) + 1
    report.num_scans = len(chosen)
    is_kept = partial(_is_kept, pipelines=dict(pipelines))
    check_dipy(scan.paths[0] for scan in chosen if needs_fit(scan.paths, scan.modality) and not is_kept(scan))
    results = map_unordered(partial(_warm, pipelines=dict(pipelines)), chosen, num_workers=num_workers)
    report.failed = [error for error in progress(results, len(chosen)) if error is not None]
    report.failed.sort(key=lambda error: error.path)
    report.num_kept = len(chosen) - len(report.failed)
    if any(pipeline.cache is not None and pipeline.cache.max_bytes is not None for pipeline in pipelines.values()):
        report.num_kept = sum(map_unordered(is_kept, chosen, num_workers=num_workers))
    return report


def _warm(scan: Scan, *, pipelines: Mapping[str, Pipeline]) -> ScanError | None:
    try:
        pipelines[scan.modality].warm(scan.paths, mask=scan.mask)
    except ScanError as error:
        return error.bare()
    return None


def _is_kept(scan: Scan, *, pipelines: Mapping[str, Pipeline]) -> bool:
    """Whether a scan is in the cache of its pipeline as things stand."""
    try:
        return pipelines[scan.modality].is_cached(scan.paths, mask=scan.mask)
    except ScanError:
        return False
