"""The report's tables: scores with their intervals, some answers, and differences between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from umbrella_train.config.schema import flatten
from umbrella_train.evaluation.metrics import ERROR_TYPES
from umbrella_train.evaluation.score_table import Cell, error_table, hit_table, score_cell
from umbrella_train.report.run_data import RunData, label_of

# Per task: half of them wrong, half of them right.
NUM_EXAMPLES = 4


def tiles(run: RunData) -> list[dict[str, str]]:
    """The accuracy of each modality, for the top of the page."""
    found = []
    for name in run.names_below("accuracy"):
        if "/" in name:
            continue
        labels = ("accuracy", "majority", "unparsed", "subjects")
        own, majority, unparsed, subjects = (score_cell(run.evaluation, label, name) for label in labels)
        unreadable = f", unreadable: {unparsed.value}" if run.evaluation.get(f"eval/unparsed/{name}") else ""
        found.append(
            {
                "name": name,
                "value": own.value,
                "interval": f"{subjects.value} subjects, 95 % interval {own.note}",
                "reference": f"commonest answer: {majority.value}{unreadable}",
            }
        )
    return found


def score_tables(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The tables of hits and of errors that have rows; each run has its own rows."""
    found = []
    for build in (hit_table, error_table):
        tables = [(run, build(run.evaluation, run.modalities)) for run in runs]
        rows = [_row(run, name, cells) for run, table in tables for name, cells in table.rows.items()]
        if rows:
            columns = dict(tables[0][1].columns)
            del columns["subjects"]  # below the number of questions
            found.append({"is_of_errors": build is error_table, "columns": columns, "rows": rows})
    return found


def _row(run: RunData, name: str, cells: Mapping[str, Cell]) -> dict[str, Any]:
    units = {f"{row.get('modality')}/{row.get('task')}": row.get("unit") for row in run.predictions}
    folded = {**cells, "questions": Cell(cells["questions"].value, f"{cells['subjects'].value} subjects")}
    return {"run": run.name, "name": label_of(name), "is_total": "/" not in name, "unit": units.get(name) or "",
            "cells": folded}  # fmt: skip


def examples(run: RunData) -> Iterator[dict[str, Any]]:
    """A few answers of each task, with their own scans, the worst first."""
    own = [row for row in run.predictions if row.get("condition") == "accuracy"]
    for kind in dict.fromkeys((row.get("modality"), row.get("task")) for row in own):
        members = [row for row in own if (row.get("modality"), row.get("task")) == kind]
        is_error = members[0].get("type") in ERROR_TYPES
        # The worst is the largest error, or a hit of 0.
        members.sort(key=lambda row: row.get("score") or 0.0, reverse=is_error)
        half = NUM_EXAMPLES // 2
        for row in [*members[:half], *members[half:][-half:]]:
            verdict = "" if is_error else "right" if row.get("score") else "wrong"
            keys = ("subject", "modality", "question", "answer", "unit", "generated")
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
