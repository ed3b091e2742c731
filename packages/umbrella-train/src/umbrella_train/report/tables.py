"""The report's tables: scores with their intervals, some answers, and differences between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from umbrella_train.config.schema import flatten
from umbrella_train.evaluation.comparison import COMPARED
from umbrella_train.evaluation.score_table import (
    DASH,
    NO_INTERVAL,
    OVERLAP_MARK,
    OVERLAP_NOTE,
    TABLES,
    Cell,
    ScoreTable,
    build_table,
)
from umbrella_train.report.run_data import RunData, label_of

# Per task: half of them wrong, half of them right.
NUM_EXAMPLES = 4


def tiles(run: RunData) -> list[dict[str, Any]]:
    """The main figure of each task, for the top of the page."""
    found = []
    for kind in TABLES:
        for name, row in build_table(kind, run.evaluation, run.modalities).rows.items():
            main = next((label for label in COMPARED if label in row and row[label].note), None)
            if main is None or f"eval/{main}/{name}" not in run.evaluation:
                continue  # a baseline's row, or nothing was readable
            references = [
                f"{'right answers' if label == 'accuracy' else kind.columns[label]}: {row[label].value}"
                for label in ("accuracy", "majority", "r2", "error_constant", "exact_match")
                if label in row and label != main and row[label].value != DASH
            ]
            found.append(
                {
                    "has_overlap": any(OVERLAP_MARK in words for words in (row[main].value, *references)),
                    "name": f"{label_of(name)}: {COMPARED[main]}",
                    "value": row[main].value,
                    "interval": f"{row['subjects'].value} subjects, {_interval(row[main].note)}",
                    "reference": ", ".join(references),
                }
            )
    return found


def _interval(note: str) -> str:
    return note if note == NO_INTERVAL else f"95 % interval {note}"


def score_tables(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The tables of the answer types that have rows; each run has its own rows."""
    found = []
    for kind in TABLES:
        tables = [(run, build_table(kind, run.evaluation, run.modalities)) for run in runs]
        rows = [_row(run, table, name) for run, table in tables for name in table.rows]
        if rows:
            columns = {label: heading for label, heading in kind.columns.items() if label != "subjects"}
            used = {label for label in columns if any(row["cells"][label].value != DASH for row in rows)}
            remarks = [(run.name, remark) for run, table in tables for remark in table.remarks]
            overlap = OVERLAP_NOTE if any(table.has_overlap for _, table in tables) else ""
            found.append(
                {
                    "title": kind.title,
                    "has_units": kind.needs == "error_constant",
                    "columns": {label: columns[label] for label in columns if label in used},
                    "rows": rows,
                    "remarks": remarks,
                    "overlap": overlap,
                }
            )
    return found


def _row(run: RunData, table: ScoreTable, name: str) -> dict[str, Any]:
    units = {f"{row.get('modality')}/{row.get('task')}": row.get("unit") for row in run.predictions}
    cells = dict(table.rows[name])
    baseline = table.baselines.get(name)
    if baseline is None:
        cells["questions"] = Cell(cells["questions"].value, f"{cells['subjects'].value} subjects")
    label = label_of(name) if baseline is None else f"baseline: {baseline}"
    return {"run": run.name, "name": label, "is_baseline": baseline is not None, "unit": units.get(name) or "",
            "cells": cells}  # fmt: skip


def examples(run: RunData) -> Iterator[dict[str, Any]]:
    """A few answers of each task, with their own scans, the worst first."""
    own = [row for row in run.predictions if row.get("condition") == "accuracy"]
    for kind in dict.fromkeys((row.get("modality"), row.get("task")) for row in own):
        members = [row for row in own if (row.get("modality"), row.get("task")) == kind]
        is_error = members[0].get("type") == "number"
        # The worst is the largest error, or a hit of 0.
        members.sort(key=lambda row: row.get("score") or 0.0, reverse=is_error)
        half = NUM_EXAMPLES // 2
        for row in [*members[:half], *members[half:][-half:]]:
            verdict = "" if is_error else "right" if row.get("score") else "wrong"
            keys = ("subject", "modality", "question", "answer", "unit", "predicted", "generated")
            shown = {key: row.get(key) for key in keys}
            yield {key: _words(value) for key, value in shown.items()} | {"verdict": verdict}


def facts(run: RunData) -> list[tuple[str, str]]:
    """Main settings of a run."""
    flat = dict(flatten(run.config))
    found = {
        "steps trained": run.last_step,
        "seed": flat.get("seed"),
        "batch size per rank": flat.get("trainer.per_device_train_batch_size"),
        "gradient accumulation": flat.get("trainer.gradient_accumulation_steps"),
        "learning rate": flat.get("trainer.learning_rate"),
        "optimizer": flat.get("trainer.optim"),
        "batches": flat.get("data.batches"),
        "trained parts": flat.get("model.learn.preset"),
        "dummy loss": _dummy_loss(run.config.get("dummy_loss")),
    }
    for name in run.modalities:
        sizes = [flat.get(f"model.modalities.{name}.{key}") for key in ("image_size", "patch_size")]
        shown = ["×".join(map(str, size)) for size in sizes if isinstance(size, list)]
        found[name] = ", patch ".join(shown) or None
    return [(name, str(value)) for name, value in found.items() if value is not None]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys with different values in the configurations."""
    flats = [dict(flatten(config)) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat if key != "name")
    rows = [(key, [str(flat.get(key, "–")) for flat in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _words(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _dummy_loss(section: object) -> str | None:
    if not isinstance(section, Mapping):
        return None
    if not section.get("enabled", True):
        return "off"
    return ", ".join(str(section[key]) for key in ("scale", "reduction", "absent") if key in section)
