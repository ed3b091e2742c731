"""The report's tables: scores with their intervals, some answers, and where runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from umbrella_train.evaluation.metrics import ERROR_TYPES
from umbrella_train.evaluation.score_table import ERROR_COLUMNS, HIT_COLUMNS, number, percent, shown_names
from umbrella_train.report.run_data import RunData, label_of, question_names

# Of each task: half wrong ones, which are those to look at, and half right ones.
NUM_EXAMPLES = 4


def tiles(run: RunData) -> list[dict[str, str]]:
    """The accuracy of each modality, for the top of the page."""
    return [
        {
            "name": name,
            "value": percent(run.evaluation[f"eval/accuracy/{name}"]),
            "note": f"{_counts(run, name)['subjects']}, 95 % interval {_cell(run, 'accuracy', name)[1]}",
            "beside": _beside(run, name),
        }
        for name in question_names(run, "accuracy")
        if "/" not in name
    ]


def _beside(run: RunData, name: str) -> str:
    """What a share of right answers is to be held against."""
    unparsed = run.evaluation.get(f"eval/unparsed/{name}", 0.0)
    said = [f"the commonest answer: {percent(run.evaluation.get(f'eval/majority/{name}'))}"]
    return ", ".join([*said, *([f"unreadable: {percent(unparsed)}"] if unparsed else [])])


def hit_rows(run: RunData) -> Iterator[dict[str, Any]]:
    """One row a question with right and wrong answers, below one of a modality that has several."""
    shown = set(shown_names(run.evaluation, "accuracy"))
    for name in question_names(run, "accuracy"):
        if name not in shown:
            continue
        yield {
            "run": run.name,
            "name": label_of(name),
            "is_total": "/" not in name,
            "cells": [_cell(run, label, name) for label in HIT_COLUMNS],
            "majority": percent(run.evaluation.get(f"eval/majority/{name}")),
            **_counts(run, name),
        }


def error_rows(run: RunData) -> Iterator[dict[str, Any]]:
    """One row a question about a number, also where not one answer could be read."""
    units = {f"{row.get('modality')}/{row.get('task')}": row.get("unit") for row in run.predictions}
    for name in question_names(run, "questions"):
        is_number = f"eval/error_constant/{name}" in run.evaluation or f"eval/accuracy/{name}" not in run.evaluation
        if "/" not in name or not is_number:
            continue
        yield {
            "run": run.name,
            "name": label_of(name),
            "unit": units.get(name) or "",
            "cells": [_cell(run, label, name, is_share=False) for label in ERROR_COLUMNS],
            "constant": number(run.evaluation.get(f"eval/error_constant/{name}")),
            **_counts(run, name),
        }


def examples(run: RunData) -> Iterator[dict[str, Any]]:
    """A few answers of each task, given with their own scans, the worst first."""
    own = [row for row in run.predictions if row.get("condition") == "accuracy"]
    for kind in dict.fromkeys((row.get("modality"), row.get("task")) for row in own):
        members = [row for row in own if (row.get("modality"), row.get("task")) == kind]
        is_error = members[0].get("type") in ERROR_TYPES
        # An error is the worse the larger; a hit is 1.
        members.sort(key=lambda row: row.get("score") or 0.0, reverse=is_error)
        half = NUM_EXAMPLES // 2
        for row in [*members[:half], *members[half:][-half:]]:
            verdict = "" if is_error else "right" if row.get("score") else "wrong"
            keys = ("subject", "modality", "question", "answer", "unit", "generated")
            shown = {key: row.get(key) for key in keys}
            yield {key: _words(value) for key, value in shown.items()} | {"verdict": verdict}


def facts(run: RunData) -> list[tuple[str, str]]:
    """What a reader wants to know of a run's configuration."""
    flat = dict(flatten(run.config))
    found = {
        "steps trained": run.last_step,
        "seed": flat.get("seed"),
        "batch size a rank": flat.get("trainer.per_device_train_batch_size"),
        "gradient accumulation": flat.get("trainer.gradient_accumulation_steps"),
        "learning rate": flat.get("trainer.learning_rate"),
        "optimizer": flat.get("trainer.optim"),
        "batches": flat.get("data.batches"),
        "what learns": flat.get("model.learn.preset"),
        "dummy loss": _dummy_loss(run.config.get("dummy_loss")),
    }
    for name in run.modalities:
        sizes = [flat.get(f"model.modalities.{name}.{key}") for key in ("image_size", "patch_size")]
        shown = ["×".join(map(str, size)) for size in sizes if isinstance(size, list)]
        found[name] = ", patch ".join(shown) or None
    return [(name, str(value)) for name, value in found.items() if value is not None]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all configurations."""
    flats = [dict(flatten(config)) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat if key != "name")
    rows = [(key, [str(flat.get(key, "–")) for flat in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections under dotted keys."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(run: RunData, label: str, name: str, *, is_share: bool = True) -> tuple[str, str]:
    value = run.evaluation.get(f"eval/{label}/{name}")
    if value is None:
        return "–", ""
    lower, upper = (run.evaluation[f"eval/{label}_{side}/{name}"] for side in ("lower", "upper"))
    if is_share:
        return percent(value), f"{100 * lower:.0f} to {100 * upper:.0f} %"
    return number(value), f"{number(lower)} to {number(upper)}"


def _words(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _counts(run: RunData, name: str) -> dict[str, str]:
    return {
        "unparsed": percent(run.evaluation.get(f"eval/unparsed/{name}")),
        "questions": str(run.evaluation.get(f"eval/questions/{name}", "–")),
        "subjects": f"{run.evaluation.get(f'eval/subjects/{name}', '–')} subjects",
    }


def _dummy_loss(section: object) -> str | None:
    if not isinstance(section, Mapping):
        return None
    if not section.get("enabled", True):
        return "off"
    return ", ".join(str(section[key]) for key in ("scale", "reduction", "absent") if key in section)
