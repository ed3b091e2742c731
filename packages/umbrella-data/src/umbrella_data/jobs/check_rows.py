"""The result of a check as JSON values, with names of subjects and files hashed or in plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from umbrella_data.jobs.cohort_table import answer_notes, cohort_rows, note_rows, task_rows

if TYPE_CHECKING:
    from umbrella_data.jobs.check import CheckReport, ManifestCheck


def report_rows(report: CheckReport, *, name: Callable[[str], str], with_words: bool) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        report: The result.
        name: Returns the name of a subject or file in the report: a hash, or the name itself.
        with_words: Whether messages are included, which name files and subjects in plain text.
    """
    rows = partial(_row_problems, with_words=with_words)
    return {
        "is_good": report.is_good,
        "num_files": report.num_files,
        "manifests": [
            {
                "manifest": name(str(each.path)),
                "num_rows": each.num_rows,
                "num_left_out": each.num_left_out,
                "num_subjects": len(each.subjects),
                "scans": dict(sorted(each.scans.items())),
                "warnings": dict(sorted(each.warnings.items())),
                "tasks": task_rows(each.tasks),
                "notes": note_rows(answer_notes(each.tasks)),
                "row_problems": list(rows(each)),
            }
            for each in report.manifests
        ],
        "bad_files": [
            {
                "scan": name(bad.error.path),
                "subject": name(bad.subject),
                "modality": bad.modality,
                "reason": str(bad.error.reason),
                "manifests": [name(str(path)) for path in bad.manifests],
                **({"words": str(bad.error)} if with_words else {}),
            }
            for bad in report.bad_files
        ],
        "warnings": report.warnings.rows(name=name),
        "diffusion_protocols": [
            {"num_scans": count, "shells": [asdict(shell) for shell in shells]}
            for shells, count in report.diffusion_protocols
        ],
        **cohort_rows(report.cohort),
        "notes": note_rows(report.cohort.notes),
        "shared_subjects": [
            {"subject": name(subject), "manifests": [name(str(path)) for path in paths]}
            for subject, paths in report.shared_subjects.items()
        ],
        "shared_scans": [
            {"scan": name(str(scan)), "manifests": [name(str(path)) for path in paths]}
            for scan, paths in report.shared_scans.items()
        ],
        "copies": [[name(str(path)) for path in group] for group in report.copies],
    }


def _row_problems(manifest: ManifestCheck, *, with_words: bool) -> Iterator[dict[str, Any]]:
    for line, words in manifest.problems:
        yield {"line": line, "words": words} if with_words else {"line": line}
