"""Scores as a table for the terminal, and the words by which tables call the conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from types import MappingProxyType

# By what is in a metric's name.
HIT_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "own scan",
        "shuffled": "another's scan",
        "swapped": "other answer's scan",
        "no_scan": "no scan",
        "chance": "guessing",
    }
)
ERROR_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "error": "own scan",
        "error_shuffled": "another's scan",
        "error_swapped": "other answer's scan",
        "error_no_scan": "no scan",
    }
)
_DASH = "–"


def score_table(metrics: Mapping[str, float]) -> str:
    """The scores that a reader looks for first, as text; what is in no table is in metrics.jsonl.

    Args:
        metrics: As of `umbrella_train.evaluation.metrics.summarise`.

    Returns:
        A table of right answers, one of errors, or both; each with 95 % intervals for the own scan. Empty without
        scores.
    """
    tables = [_table(_hit_lines(metrics)), _table(_error_lines(metrics))]
    return "\n\n".join(table for table in tables if table)


def shown_names(metrics: Mapping[str, float], kind: str) -> list[str]:
    """Names below `eval/KIND/`, without the totals of modalities that were asked one question only."""
    prefix = f"eval/{kind}/"
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    return [name for name in names if "/" in name or sum(other.startswith(f"{name}/") for other in names) != 1]


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return _DASH if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """An error in the unit of its question, or a dash."""
    return _DASH if value is None else f"{value:.3g}"


def _hit_lines(metrics: Mapping[str, float]) -> Iterator[Sequence[str]]:
    names = shown_names(metrics, "accuracy")
    labels = [label for label in HIT_COLUMNS if any(f"eval/{label}/{name}" in metrics for name in names)]
    beside = {"majority": "commonest answer", **_unreadable(metrics, names)}
    if names:
        yield "right answers", *(HIT_COLUMNS[label] for label in labels), *beside.values(), "subjects"
    for name in names:
        cells = [percent(metrics.get(f"eval/{label}/{name}")) for label in (*labels, *beside)]
        lower, upper = (100 * metrics[f"eval/accuracy_{side}/{name}"] for side in ("lower", "upper"))
        cells[0] += f" ({lower:.0f} to {upper:.0f})"
        yield name, *cells, f"{metrics[f'eval/subjects/{name}']:.0f}"


def _error_lines(metrics: Mapping[str, float]) -> Iterator[Sequence[str]]:
    # By the guess, which is there also where not one answer could be read, and there is no error.
    names = [key.removeprefix("eval/error_constant/") for key in metrics if key.startswith("eval/error_constant/")]
    labels = [label for label in ERROR_COLUMNS if any(f"eval/{label}/{name}" in metrics for name in names)]
    unreadable = _unreadable(metrics, names)
    if names:
        yield "mean error", *map(ERROR_COLUMNS.__getitem__, labels), "best constant", *unreadable.values(), "subjects"
    for name in names:
        cells = [number(metrics.get(f"eval/{label}/{name}")) for label in (*labels, "error_constant")]
        if f"eval/error/{name}" in metrics:
            sides = (number(metrics[f"eval/error_{side}/{name}"]) for side in ("lower", "upper"))
            cells[0] += f" ({' to '.join(sides)})"
        cells += [percent(metrics[f"eval/{label}/{name}"]) for label in unreadable]
        yield name, *cells, f"{metrics[f'eval/subjects/{name}']:.0f}"


def _unreadable(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, str]:
    """The column of answers that could not be read, where there are any."""
    is_any = any(metrics.get(f"eval/unparsed/{name}") for name in names)
    return {"unparsed": "unreadable"} if is_any else {}


def _table(lines: Iterator[Sequence[str]]) -> str:
    """Columns as wide as what they hold, the first to the left, numbers to the right; headings over several lines."""
    rows = list(lines)
    if not rows:
        return ""
    headings, *body = rows
    widths = [
        max(*map(len, cells), *map(len, heading.split())) for heading, *cells in zip(headings, *body, strict=True)
    ]
    folded = [wrap(heading, width) for heading, width in zip(headings, widths, strict=True)]
    height = max(map(len, folded))
    above = zip(*([""] * (height - len(words)) + words for words in folded), strict=True)
    return "\n".join(
        "  ".join(f"{cell:>{width}}" if place else f"{cell:<{width}}" for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (*above, *body))
    )
