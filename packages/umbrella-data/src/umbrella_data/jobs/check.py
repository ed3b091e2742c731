"""Validates every row and every file of manifests, and finds subjects and scans that are in several of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbrella_data.chat.row_check import encoding_problems
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.jobs.cohort_table import CohortTable, TaskAnswers, add_answer
from umbrella_data.jobs.copies import find_copies
from umbrella_data.manifest.answers import contradiction
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Scan, subject_key
from umbrella_data.modality import find_modality
from umbrella_data.pipeline.config import MAX_REMOVED, PipelineConfig
from umbrella_data.scan.diffusion import check_dipy, needs_fit
from umbrella_data.scan.gradient_table import Shell
from umbrella_data.scan.gzip_index import check_indexed_gzip
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_B, NonFinite, check_b_limits
from umbrella_data.scan.shard import ScanParts, read_scans
from umbrella_data.scan.verify import VerifiedScan, verify_scan
from umbrella_data.scan.warnings import WarningList

if TYPE_CHECKING:
    from umbrella_data.chat.encoder import ChatEncoder

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
_NO_PROGRESS: Progress = lambda items, total, words: items  # noqa: E731, ARG005


@dataclass
class ManifestCheck:
    """Result of one manifest.

    Attributes:
        path: The manifest.
        num_rows: Number of rows, including unusable and skipped ones.
        num_left_out: Number of skipped rows, with scans of modalities that were not selected.
        problems: Line and message of each problem of a row.
        subjects: Number of rows by subject.
        scans: Number of different scans by modality.
        tasks: Answers of the usable rows, by task.
        warnings: Number of usable scans by warning code, see `umbrella_data.scan.header.ScanWarning`.
    """

    path: Path
    num_rows: int
    num_left_out: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    subjects: Counter[str] = field(default_factory=Counter)
    scans: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, TaskAnswers] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class BadFile:
    """An unusable scan and where it is named.

    Attributes:
        error: Error of the scan.
        modality: Modality of the scan.
        subject: Subject of the first row that names the scan.
        manifests: Manifests that name the scan.
    """

    error: ScanError
    modality: str
    subject: str
    manifests: tuple[Path, ...]


@dataclass
class CheckReport:
    """Result of `check_manifests`.

    Attributes:
        manifests: Result of each manifest.
        bad_files: Unusable scans.
        num_files: Number of scans that were read.
        warnings: Usable scans with inconsistent headers or sidecars.
        shared_subjects: Subjects that are in more than one manifest, with these manifests.
        shared_scans: Scans that are in more than one manifest under different subjects, with those.
        num_dwis: Number of usable DWIs by their shells.
        cohort: Repetition times, tasks of series and masks of all manifests.
        copies: Groups of files with the same content, of different subjects or in different manifests.
    """

    manifests: list[ManifestCheck]
    bad_files: list[BadFile] = field(default_factory=list)
    num_files: int = 0
    warnings: WarningList = field(default_factory=WarningList)
    num_dwis: Counter[tuple[Shell, ...]] = field(default_factory=Counter)
    cohort: CohortTable = field(default_factory=CohortTable)
    shared_subjects: dict[str, list[Path]] = field(default_factory=dict)
    shared_scans: dict[Path, list[Path]] = field(default_factory=dict)
    copies: list[tuple[Path, ...]] = field(default_factory=list)

    @property
    def diffusion_protocols(self) -> list[tuple[tuple[Shell, ...], int]]:
        """The shells of DWIs with the number of usable scans, the most frequent ones first."""
        return sorted(self.num_dwis.items(), key=lambda each: (-each[1], each[0]))

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        has_problems = any(manifest.problems for manifest in self.manifests)
        return not (has_problems or self.bad_files or self.shared_subjects or self.shared_scans or self.copies)


def check_manifests(
    manifests: Sequence[Manifest],
    *,
    num_workers: int | None = None,
    may_share_subjects: bool = False,
    modalities: Collection[str] | None = None,
    index_folder: Path | None = None,
    encoder: ChatEncoder | None = None,
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
    non_finite: NonFinite = "outside_mask",
    configs: Mapping[str, PipelineConfig] | None = None,
    parts: ScanParts | None = None,
    progress: Progress = _NO_PROGRESS,
) -> CheckReport:
    """Read every row of every manifest, then every scan once.

    Args:
        manifests: Each is treated as a split.
        num_workers: Processes that read scans; None for one per core.
        may_share_subjects: Whether the manifests belong to one split, so that a subject may be in several.
        modalities: Names or aliases; rows with scans of other modalities are skipped. None skips no row.
        index_folder: Where to build indexes of long `.nii.gz` series; None builds none.
        encoder: Encodes every row, as training does; None encodes none.
        max_b: Largest b-value that the tensor of a DWI is fitted on, in s/mm2.
        b0_threshold: Largest b-value of a b0 volume of a DWI, in s/mm2.
        non_finite: What to do with voxels that are not finite.
        configs: The preprocessing of a run, by modality: it replaces the three arguments before it, and scans of which
            the model's box holds too little get the warning `cropped`.
        parts: If given, only the scans of its shard are read; rows are not encoded, and neither subjects nor scans are
            compared. Or if it merges, no scan is read.
        progress: Wraps an iterable; called with it, its length and a label.

    Raises:
        ValueError: For an unknown modality, or a `b0_threshold` that is not below `max_b`.
        ImportError: If dipy is missing and a DWI must be fitted, or `indexed_gzip` is missing and an index folder is
            given. Raised before a scan is read.
        ManifestError: With everything that is wrong with the shards to merge.
        CacheError: If an index cannot be written.
    """
    if index_folder is not None:
        check_indexed_gzip()
    check_b_limits(max_b=max_b, b0_threshold=b0_threshold)
    wanted = None if modalities is None else {find_modality(name).name for name in modalities}
    report = CheckReport([ManifestCheck(manifest.path, len(manifest)) for manifest in manifests])
    places: dict[Scan, dict[Path, str]] = defaultdict(dict)
    is_shard = parts is not None and parts.shard is not None
    for manifest, found in zip(manifests, report.manifests, strict=True):
        _check_rows(manifest, found, places, progress, modalities=wanted)
        if encoder is not None and not is_shard:
            found.problems = sorted([*found.problems, *encoding_problems(manifest, encoder)])
    check_dipy(scan.paths[0] for scan in places if needs_fit(scan.paths, scan.modality))
    if not is_shard:
        if not may_share_subjects:
            report.shared_subjects = _shared_subjects(report.manifests)
            report.shared_scans = _shared_scans(places)
        report.copies = _copies(places, across_manifests=not may_share_subjects)
    for scan in places:
        report.cohort.add_scan(scan)
    limits: dict[str, Any] = {"max_b": max_b, "b0_threshold": b0_threshold, "non_finite": non_finite}
    verify = partial(_verify, index_folder=index_folder, configs=configs or {}, **limits)
    dumped = {name: config.model_dump(mode="json") for name, config in (configs or {}).items()}
    # In the order of the rows: equal counts are then listed in the same order in every run.
    results = read_scans(
        verify,
        {scan: next(iter(homes.values())) for scan, homes in places.items()},
        parts=parts,
        files=lambda scan: scan.files,
        settings={**limits, "configs": dumped, "with_index": index_folder is not None},
        num_workers=num_workers,
        progress=lambda items, total: progress(items, total, "reading scans"),
    )
    _add_results(report, results, places)
    return report


def _add_results(
    report: CheckReport,
    results: Iterable[tuple[Scan, ScanError | VerifiedScan]],
    places: Mapping[Scan, Mapping[Path, str]],
) -> None:
    for scan, outcome in results:
        report.num_files += 1
        subject, manifests_of_scan = next(iter(places[scan].values())), tuple(places[scan])
        if isinstance(outcome, ScanError):
            report.bad_files.append(BadFile(outcome, scan.modality, subject, manifests_of_scan))
            continue
        report.warnings.add(outcome.warnings, subject=subject, modality=scan.modality, manifests=manifests_of_scan)
        if find_modality(scan.modality).is_series:
            report.cohort.add_repetition_time(scan.modality, outcome.repetition_time)
        if outcome.shells:
            report.num_dwis[outcome.shells] += 1
        codes = {str(warning) for warnings in outcome.warnings.values() for warning in warnings}
        for found in report.manifests:
            if found.path in manifests_of_scan:
                found.warnings.update(codes)
    report.bad_files.sort(key=lambda bad: bad.error.path)


def _check_rows(
    manifest: Manifest,
    found: ManifestCheck,
    places: dict[Scan, dict[Path, str]],
    progress: Progress,
    *,
    modalities: set[str] | None,
) -> None:
    line_of_id: dict[str, int] = {}
    own: set[Scan] = set()
    for row in progress(range(len(manifest)), len(manifest), f"reading {manifest.path.name}"):
        line = manifest.line(row)
        try:
            if modalities is not None and not set(manifest.modalities(row)) <= modalities:
                found.num_left_out += 1
                continue
            sample = manifest[row]
        except ManifestError as error:
            found.problems += [(line, problem) for problem in error.problems]
            continue
        first = line_of_id.setdefault(sample.id, line)
        if first != line:
            found.problems.append((line, f"line {line}: id {sample.id!r} is in line {first} already; ids are unique"))
        if problem := contradiction(sample):
            found.problems.append((line, f"line {line}: {problem}"))
        found.subjects[sample.subject] += 1
        add_answer(found.tasks, sample)
        own.update(sample.scans)
        for scan in sample.scans:
            places[scan].setdefault(manifest.path, sample.subject)
    found.scans.update(scan.modality for scan in own)


def _verify(scan: Scan, *, configs: Mapping[str, PipelineConfig], **options: Any) -> VerifiedScan:
    from umbrella_data.pipeline.crop import removed_by_crop  # late: imports torch

    config = configs.get(scan.modality)
    if config is not None:
        options |= config.reading
    verified = verify_scan(scan.paths, modality=scan.modality, mask=scan.mask, **options)
    spec = find_modality(scan.modality)
    if not config or removed_by_crop(scan.paths, mask=scan.mask, spec=spec, config=config) <= MAX_REMOVED:
        return verified
    codes = (*verified.warnings.get(scan.paths[0], ()), ScanWarning.CROPPED)
    return replace(verified, warnings={**verified.warnings, scan.paths[0]: codes})


def _shared_subjects(manifests: Sequence[ManifestCheck]) -> dict[str, list[Path]]:
    homes: dict[str, dict[Path, None]] = defaultdict(dict)
    names: dict[str, str] = {}  # the first spelling of each
    for manifest in manifests:
        for subject in manifest.subjects:
            name = names.setdefault(subject_key(subject), subject)
            homes[name][manifest.path] = None
    return {subject: list(paths) for subject, paths in sorted(homes.items()) if len(paths) > 1}


def _shared_scans(places: dict[Scan, dict[Path, str]]) -> dict[Path, list[Path]]:
    """Scans in several manifests under different subjects; shared subjects are reported already."""
    # The same scan with and without a mask counts as one.
    homes_of: dict[tuple[Path, ...], dict[Path, str]] = defaultdict(dict)
    for scan, homes in places.items():
        homes_of[scan.paths] |= homes
    return {
        paths[0]: list(homes)
        for paths, homes in homes_of.items()
        if len(homes) > 1 and len(set(map(subject_key, homes.values()))) > 1
    }


def _copies(places: dict[Scan, dict[Path, str]], *, across_manifests: bool) -> list[tuple[Path, ...]]:
    """Files with the same content that have different subjects or are in different manifests."""
    homes: dict[Path, set[str | Path]] = defaultdict(set)
    for scan, subject_of in places.items():
        for path in scan.paths:
            homes[path].update(map(subject_key, subject_of.values()))
            homes[path].update(subject_of if across_manifests else ())
    groups = find_copies(homes)
    return [group for group in groups if any(homes[path] != homes[group[0]] for path in group)]
