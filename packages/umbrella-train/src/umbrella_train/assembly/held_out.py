"""Whether the evaluation data are held out: no subject, and no file's content, is in the training data too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umbrella_data.jobs.copies import find_copies
from umbrella_data.manifest.sample import subject_key
from umbrella_train.assembly.subject_parts import open_source
from umbrella_train.config import DatasetConfig
from umbrella_train.distributed.ranks import is_first_rank, on_first_rank
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


@dataclass(frozen=True)
class Overlap:
    """What is in both the training and the evaluation data.

    Attributes:
        subjects: Names of subjects, without a prefix `sub-`.
        files: Files of the training data, and a file of the evaluation data with the same content; one and the same
            file under two subjects counts.
        num_unchecked: Rows, if there are too many of them to compare.
    """

    subjects: tuple[str, ...] = ()
    files: tuple[tuple[Path, Path], ...] = ()
    num_unchecked: int = 0

    def __bool__(self) -> bool:
        return bool(self.subjects or self.files)

    @property
    def metrics(self) -> dict[str, int]:
        """Its row of `metrics.jsonl`, by which the report knows what is held out; empty if all is."""
        if self.num_unchecked:
            return {"overlap/unchecked_rows": self.num_unchecked}
        return {"overlap/subjects": len(self.subjects), "overlap/files": len(self.files)} if self else {}

    def __str__(self) -> str:
        pairs = [str(one) if one == other else f"{one} = {other}" for one, other in self.files]
        parts = [("subjects", self.subjects), ("files with the same content", pairs)]
        return "; ".join(f"{len(items)} {what} ({_listed(items)})" for what, items in parts if items)


def check_held_out(
    train: Sequence[DatasetConfig], evaluation: Sequence[DatasetConfig], *, max_rows: int, allow_overlap: bool
) -> Overlap:
    """Compare subjects, and the content of files, of the training and the evaluation data; called by every rank.

    The first rank reads a few hundred bytes of each file, and of candidates all, see `umbrella_data.jobs.copies`. With
    more than `max_rows` rows in all, nothing is compared, and a warning names the command that does.

    Raises:
        RunError: Something is in both; with `allow_overlap`, this is a warning.
    """
    overlap = on_first_rank(lambda: _find_overlap(train, evaluation, max_rows=max_rows))
    if overlap and not allow_overlap:
        raise RunError(
            f"data.train and data.evaluation have in common: {overlap}; split by subject, as umbrella-data from-bids "
            "does, or set data.allow_overlap: true, and the report will say that the scores are not held out"
        )
    if overlap and is_first_rank():
        logger.warning("data.train and data.evaluation have in common: %s; the scores are not held out", overlap)
    return overlap


def _find_overlap(train: Sequence[DatasetConfig], evaluation: Sequence[DatasetConfig], *, max_rows: int) -> Overlap:
    manifests = [[open_source(source, may_end_with_user=True) for source in part] for part in (train, evaluation)]
    num_rows = sum(len(manifest) for part in manifests for manifest in part)
    if num_rows > max_rows:
        paths = " ".join(dict.fromkeys(str(manifest.path) for part in manifests for manifest in part))
        logger.warning(
            "%d rows are more than the %d in which overlaps of training and evaluation data are searched before a run; "
            "search them with: umbrella-data check %s", num_rows, max_rows, paths,
        )  # fmt: skip
        return Overlap(num_unchecked=num_rows)
    subjects: list[set[str]] = []
    files: list[dict[Path, None]] = []
    for part in manifests:
        samples = [manifest[row] for manifest in part for row in range(len(manifest))]
        subjects.append({subject_key(sample.subject) for sample in samples})
        files.append(dict.fromkeys(path for sample in samples for scan in sample.scans for path in scan.paths))
    common = [(path, path) for path in files[0] if path in files[1]]
    groups = find_copies(dict.fromkeys([*files[0], *files[1]]))
    copies = [
        (one, other)
        for group in groups
        for one in group
        for other in group
        if one != other and one in files[0] and other in files[1]
    ]
    return Overlap(tuple(sorted(subjects[0] & subjects[1])), (*common, *copies))


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
