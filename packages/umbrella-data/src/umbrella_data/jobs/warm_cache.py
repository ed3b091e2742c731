"""Fills the cache ahead of a run: every scan of the manifests is preprocessed once, in parallel; resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from umbrella_data.errors import ScanError
from umbrella_data.files.parallel import map_unordered
from umbrella_data.manifest.sample import Scan
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.scan.diffusion import check_dipy, needs_fit
from umbrella_data.scan.shard import Shard

if TYPE_CHECKING:
    from umbrella_data.manifest.manifest import Manifest


@dataclass
class WarmReport:
    """Result of `warm_cache`.

    Attributes:
        has_scans: Whether any scan of the manifests, in this shard or another, has a pipeline.
        num_scans: Number of scans that have a pipeline, of this shard.
        num_kept: How many of them are in the cache at the end; a size limit may have evicted others.
        failed: Errors of unusable scans.
        skipped: Number of scans without a pipeline, of this shard, by modality.
    """

    has_scans: bool = True
    num_scans: int = 0
    num_kept: int = 0
    failed: list[ScanError] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def warm_cache(
    manifests: Sequence[Manifest],
    *,
    pipelines: Mapping[str, Pipeline],
    num_workers: int | None = None,
    shard: Shard | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,  # noqa: ARG005
) -> WarmReport:
    """Put every scan into the cache of its pipeline, unless it is there already.

    Args:
        manifests: Manifests with the scans.
        pipelines: By modality, each with a cache.
        num_workers: Number of processes; None for one per core.
        shard: Only the scans of these subjects; shards may be run at the same time.
        progress: Wraps the results, as tqdm does; called with their number.

    Raises:
        ManifestError: For an unreadable row.
        ValueError: For a pipeline without a cache.
        ImportError: If a DWI must be fitted and dipy is missing, before a scan is read.
    """
    uncached = sorted(name for name, pipeline in pipelines.items() if pipeline.cache is None)
    if uncached:
        raise ValueError(f"the pipelines of {', '.join(uncached)} have no cache")
    scans: dict[Scan, str] = {}
    for manifest in manifests:
        for sample in manifest:
            for scan in sample.scans:
                scans.setdefault(scan, sample.subject)
    report = WarmReport(has_scans=any(scan.modality in pipelines for scan in scans))
    if shard is not None:
        mine = shard.subjects(scans.values())
        scans = {scan: subject for scan, subject in scans.items() if subject in mine}
    chosen = [scan for scan in scans if scan.modality in pipelines]
    report.skipped = dict(Counter(scan.modality for scan in scans if scan.modality not in pipelines))
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
    """Whether a scan is in the cache of its pipeline now."""
    try:
        return pipelines[scan.modality].is_cached(scan.paths, mask=scan.mask)
    except ScanError:
        return False
