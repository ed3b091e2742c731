"""`umbrella-data check`: validates every row and every file of manifests."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.cli.arguments import (
    add_b_limits,
    add_manifests,
    add_modalities,
    add_non_finite,
    add_shard,
    add_workers,
    choose_parts,
)
from umbrella_data.cli.output import choose_names, print_list, print_lost_root, print_shard, print_warnings, show

if TYPE_CHECKING:
    from umbrella_data.jobs.check import CheckReport
    from umbrella_data.jobs.cohort_table import CohortNote, TaskAnswers

# Options of one task in the terminal; check.json has all.
_MAX_OPTIONS = 10

SUMMARY = "validate every row and every file"
HELP = """\
Reads every row of the manifests and every scan in them completely. Lists what is unusable and why: unreadable scans,
rows whose answer contradicts the scored value, subjects in more than one manifest (each manifest is treated as a split)
and scans with the same content under several names. The exit code is 1 if anything is wrong. Warnings, such as
forms_disagree, are about usable scans with an inconsistent header (also of a brain mask) or sidecar; they do not change
the exit code. The terminal shows the first 5 scans of each code, check.json the first 1,000, sorted by path.
With --tokenizer, rows are reported that training with this tokenizer could not encode: a turn that its chat template
rejects, a text with one of its special tokens, or a prompt that differs from the training text.
DWIs are listed by their shells: volumes of each b-value, and those left out of the tensor fit, which is on b0 and the
shells up to --max-b. Give the max_b and b0_threshold of the run (data.pipelines.dMRI).
Tables count the answers of each task, and series by repetition time and by task, and scans with and without a mask.
Notes, such as missing_codes or mixed_repetition_times, do not change the exit code either.
With --index-dir, it also builds an index of each long .nii.gz series, with which training runs read windows faster.
The terminal names files and subjects; check.json has hashes of the names unless --names is given.
`umbrella-data whois HASH --in OUT` prints the name.
--shard I/N reads the scans of one of N parts of the subjects only, in a job of its own; the same command with --merge
then writes the report that one job would have written."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_manifests(command)
    add_modalities(command)
    add_workers(command)
    add_b_limits(command)
    add_non_finite(command)
    command.add_argument(
        "--config",
        type=Path,
        help="YAML file of a training run: its pipelines replace the three options before, and scans that its crop "
        "cuts are counted (cropped)",
    )
    command.add_argument("--out", type=Path, help="folder for check.json")
    add_shard(command)
    command.add_argument("--names", action="store_true", help="write names in plain text into check.json")
    command.add_argument(
        "--index-dir",
        type=Path,
        help="also build an index of each long .nii.gz series here, for data.index_dir of a training run",
    )
    command.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="also encode every row with this tokenizer and its chat template, a folder or a name on the hub",
    )
    command.add_argument("--one-split", action="store_true", help="a subject may be in several of the manifests")


def run(options: argparse.Namespace) -> int:
    """Check, print a table, and write the report."""
    from umbrella_data.chat.row_check import load_encoder
    from umbrella_data.cli.pipeline_options import options_from_run
    from umbrella_data.files.atomic import write_atomically
    from umbrella_data.jobs.check import check_manifests
    from umbrella_data.jobs.check_rows import report_rows
    from umbrella_data.manifest.manifest import read_manifest

    manifests = [read_manifest(path, data_root=options.data_root) for path in options.manifests]
    if options.out is None and (options.shard or options.merge):
        raise ValueError("--shard and --merge need --out, the folder of check.json")
    parts = choose_parts(options, command="check")
    # Before scans are read: a folder that cannot be created ends the command here.
    name = None if options.out is None or options.shard else choose_names(options.out, are_plain=options.names)
    if options.index_dir is not None:
        options.index_dir.mkdir(parents=True, exist_ok=True)
    report = check_manifests(
        manifests,
        num_workers=options.workers,
        may_share_subjects=options.one_split,
        modalities=options.modality,
        index_folder=options.index_dir,
        encoder=None if options.tokenizer is None else load_encoder(options.tokenizer),
        max_b=options.max_b,
        b0_threshold=options.b0_threshold,
        non_finite=options.non_finite,
        configs=None if options.config is None else options_from_run(options.config).configs,
        parts=parts,
        progress=lambda items, total, label: show(items, total, label, "scan" if "scans" in label else "row"),
    )
    if options.shard:
        print_shard(options.shard, num_scans=report.num_files, errors=[bad.error for bad in report.bad_files])
        return 0
    if name is not None:
        rows = report_rows(report, name=name, with_words=options.names)
        path = options.out / "check.json"
        write_atomically(path, [json.dumps(rows, indent=1, ensure_ascii=False).encode()])
    if parts is not None:
        parts.remove()
    _print_report(report)
    if options.modality and not report.num_files:
        raise ValueError(f"no scan of {', '.join(options.modality)} in the manifests")
    print_lost_root([bad.error for bad in report.bad_files], num_scans=report.num_files, manifests=manifests)
    if name is not None:
        print(f"wrote {path}")
    return 0 if report.is_good else 1


def _print_report(report: CheckReport) -> None:
    modalities = sorted({modality for each in report.manifests for modality in each.scans})
    width = max([8, *(len(str(each.path)) for each in report.manifests)])
    warnings = sorted({warning for each in report.manifests for warning in each.warnings})
    heads = ["rows", "bad rows", "subjects", *modalities, "bad scans", *warnings]
    widths = [max(10, len(head) + 2) for head in heads]
    _print_row(f"{'manifest':{width}}", heads, widths)
    for each in report.manifests:
        bad_rows = len({line for line, _ in each.problems})
        num_bad = sum(each.path in bad.manifests for bad in report.bad_files)
        counts = [each.num_rows, bad_rows, len(each.subjects), *(each.scans[name] for name in modalities), num_bad]
        counts += [each.warnings[warning] for warning in warnings]
        _print_row(f"{each.path!s:{width}}", [f"{count:,}" for count in counts], widths)
    if num_left_out := sum(each.num_left_out for each in report.manifests):
        print(f"skipped rows with other modalities: {num_left_out:,}")
    reasons = Counter(str(bad.error.reason) for bad in report.bad_files)
    lines = [f"{each.path}: {problem}" for each in report.manifests for _, problem in each.problems]
    _print_list("unusable rows", lines)
    by_reason = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    _print_list(f"unusable scans ({by_reason})", [str(bad.error) for bad in report.bad_files])
    print_warnings(report.warnings)
    _print_protocols(report)
    _print_answers(report)
    _print_scans(report)
    _print_list(
        "subjects in more than one manifest",
        [f"{subject}: {', '.join(map(str, paths))}" for subject, paths in report.shared_subjects.items()],
    )
    _print_list(
        "scans in more than one manifest, under different subjects",
        [f"{scan}: {', '.join(map(str, paths))}" for scan, paths in report.shared_scans.items()],
    )
    _print_list(
        "scans with the same content under several names", [", ".join(map(str, each)) for each in report.copies]
    )
    print(f"{report.num_files:,} scans read: " + ("all is well" if report.is_good else "not all is well"))


def _print_protocols(report: CheckReport) -> None:
    """A table of the shells of DWIs."""
    lines = [f"{count:>8,}  {', '.join(map(str, shells))}" for shells, count in report.diffusion_protocols]
    if lines:
        print(f"\ndiffusion protocols: {len(lines):,}\n     scans  b (s/mm2) x volumes")
    print_list(lines, rest="--out FOLDER writes all")


def _print_answers(report: CheckReport) -> None:
    """A table of the answers of each manifest, with notes about their values."""
    from umbrella_data.jobs.cohort_table import answer_notes

    for each in report.manifests:
        lines = [line for task, answers in sorted(each.tasks.items()) for line in _answer_lines(task, answers)]
        if lines:
            print(f"\nanswers of {each.path}:\n      rows  task")
        print_list(lines, rest="--out FOLDER writes all")
        _print_notes(answer_notes(each.tasks))


def _answer_lines(task: str, answers: TaskAnswers) -> Iterator[str]:
    if answers.options:
        counts = [f"{option} {count:,}" for option, count in answers.options.most_common(_MAX_OPTIONS)]
        num_more = len(answers.options) - len(counts)
        more = f", and {num_more:,} more options" if num_more else ""
        yield f"{answers.options.total():>8,}  {task}: {', '.join(counts)}{more}"
    for unit, numbers in sorted(answers.numbers.items()):
        values = f"{numbers.low:g} to {numbers.high:g}, mean {numbers.mean:.4g}"
        yield f"{numbers.count:>8,}  {task}: {values} {unit}".rstrip()
    if answers.texts:
        yield f"{answers.texts.total():>8,}  {task}: texts"
    if answers.num_unanswered:
        yield f"{answers.num_unanswered:>8,}  {task}: no answer to score"


def _print_scans(report: CheckReport) -> None:
    """Tables of repetition times, tasks of series and masks, with notes about mixtures."""
    from umbrella_data.jobs.cohort_table import ordered

    cohort = report.cohort
    times = [
        f"{count:>8,}  {modality} {'unknown' if seconds is None else f'{seconds:g}'}"
        for modality, seconds, count in ordered(cohort.repetition_times)
    ]
    tasks = [
        f"{count:>8,}  {modality} {task or 'without task- in the name'}"
        for modality, task, count in ordered(cohort.series_tasks)
    ]
    masks = [
        f"{count:>8,}  {modality} {'with' if has_mask else 'without'} a mask"
        for modality, counts in sorted(cohort.masks.items())
        for has_mask, count in sorted(counts.items(), reverse=True)
    ]
    for head, lines in (("repetition times (s)", times), ("tasks of series", tasks), ("masks", masks)):
        if lines:
            print(f"\n{head}:\n     scans")
        print_list(lines, rest="--out FOLDER writes all")
    _print_notes(cohort.notes)


def _print_notes(notes: Sequence[CohortNote]) -> None:
    print_list([f"note: {note.name}: {note.words} [{note.code}]" for note in notes], rest="--out FOLDER writes all")


def _print_row(name: str, cells: Sequence[str], widths: Sequence[int]) -> None:
    print(name + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def _print_list(head: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{head}: {len(lines)}")
        print_list(lines, rest="--out FOLDER --names writes all")
