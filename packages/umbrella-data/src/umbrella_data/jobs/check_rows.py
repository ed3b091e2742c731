"""The result of a check as JSON values, with names of subjects and files hashed or in plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from umbrella_data.jobs.cohort_table import CohortNote, TaskAnswers, answer_notes, ordered

if TYPE_CHECKING:
    from umbrella_data.jobs.check import CheckReport


def report_rows(report: CheckReport, *, name: Callable[[str], str], with_words: bool) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        report: The result.
        name: Returns the name of a subject or file in the report: a hash, or the name itself.
        with_words: Whether messages are included, which name files and subjects in plain text.
    """
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
                "notes": _note_rows(answer_notes(each.tasks)),
                "row_problems": [
                    {"line": line, **({"words": words} if with_words else {})} for line, words in each.problems
                ],
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
        "repetition_times": [
            {"modality": modality, "seconds": seconds, "num_scans": count}
            for modality, seconds, count in ordered(report.cohort.repetition_times)
        ],
        "series_tasks": [
            {"modality": modality, "task": task or None, "num_scans": count}
            for modality, task, count in ordered(report.cohort.series_tasks)
        ],
        "masks": [
            {"modality": modality, "with_mask": masks[True], "without_mask": masks[False]}
            for modality, masks in sorted(report.cohort.masks.items())
        ],
        "notes": _note_rows(report.cohort.notes),
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


def task_rows(tasks: Mapping[str, TaskAnswers]) -> list[dict[str, Any]]:
    """The answers as JSON values."""
    return [
        {
            "task": task,
            "num_unanswered": answers.num_unanswered,
            "num_texts": answers.texts.total(),
            "options": dict(sorted(answers.options.items())),
            "numbers": [
                {"unit": unit or None, "count": each.count, "min": each.low, "mean": each.mean, "max": each.high}
                for unit, each in sorted(answers.numbers.items())
            ],
            "missing_codes": answers.missing_codes,
            "num_impossible_ages": answers.num_impossible,
        }
        for task, answers in sorted(tasks.items())
    ]


def _note_rows(notes: Iterable[CohortNote]) -> list[dict[str, Any]]:
    return [{"code": note.code, "name": note.name, "count": note.count} for note in notes]
