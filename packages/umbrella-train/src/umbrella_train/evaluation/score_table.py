"""Tables of scores with their intervals, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

_CONTROLS = {"shuffled": "another's scan", "swapped": "other answer's scan", "no_scan": "no scan"}
_COUNTS = {"unparsed": "unreadable", "questions": "questions", "subjects": "subjects"}
# Headings by the label in a metric's key, `eval/LABEL/NAME`.
_HIT_COLUMNS = {
    "accuracy": "own scan", **_CONTROLS, "chance": "guessing", "majority": "commonest answer", **_COUNTS,
}  # fmt: skip
_ERROR_COLUMNS = {
    "error": "own scan", **{f"error_{label}": heading for label, heading in _CONTROLS.items()},
    "error_constant": "best constant guess", **_COUNTS,
}  # fmt: skip
_DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A score as text.

    Attributes:
        value: The value, or a dash.
        note: Its 95 % interval; empty if it has none.
    """

    value: str
    note: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one kind.

    Attributes:
        title: Name of the scores.
        columns: Headings by label: `accuracy`, `shuffled`, ..., `unparsed`, `questions`, `subjects`.
        rows: A cell for each column, by the name of a modality (`T1`) or one of its tasks (`T1/sex`).
    """

    title: str
    columns: Mapping[str, str]
    rows: Mapping[str, Mapping[str, Cell]]

    def to_text(self) -> str:
        """The table for a terminal, without empty columns and with intervals for the own scan; empty without rows."""
        if not self.rows:
            return ""
        own = next(iter(self.columns))
        # `questions` is left out: the intervals count subjects.
        labels = [label for label in self.columns if label != "questions" and (label == own or self._has(label))]
        lines = [
            [name, *(_with_interval(row[label]) if label == own else row[label].value for label in labels)]
            for name, row in self.rows.items()
        ]
        return _align([self.title, *(self.columns[label] for label in labels)], lines)

    def _has(self, label: str) -> bool:
        """Whether a column has values; `unparsed` needs unreadable answers."""
        empty = {_DASH, "0.0 %"} if label == "unparsed" else {_DASH}
        return any(row[label].value not in empty for row in self.rows.values())


def score_table(metrics: Mapping[str, float]) -> str:
    """The main scores of `summarise` as text; `metrics.jsonl` has all of them.

    Returns:
        A table of right answers, one of errors, or both. Empty without scores.
    """
    tables = (table.to_text() for table in (hit_table(metrics), error_table(metrics)))
    return "\n\n".join(table for table in tables if table)


def hit_table(metrics: Mapping[str, float], modalities: Sequence[str] = ()) -> ScoreTable:
    """Fractions of right answers, without the total of a modality that has one task only; rows as in `names_below`."""
    names = names_below(metrics, "accuracy", modalities)
    names = [name for name in names if "/" in name or sum(other.startswith(f"{name}/") for other in names) != 1]
    return _table("right answers", _HIT_COLUMNS, metrics, names)


def error_table(metrics: Mapping[str, float], modalities: Sequence[str] = ()) -> ScoreTable:
    """Mean absolute errors of questions about numbers, also if no answer could be read; rows as in `names_below`."""
    # The constant guess does not need readable answers.
    names = names_below(metrics, "error_constant", modalities)
    return _table("mean error", _ERROR_COLUMNS, metrics, names)


def names_below(metrics: Mapping[str, float], label: str, modalities: Sequence[str] = ()) -> list[str]:
    """The names below `eval/LABEL/`: modalities (`T1`), in the given order, each before its tasks (`T1/sex`)."""
    prefix = f"eval/{label}/"
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    rank = {name: position for position, name in enumerate(modalities)}
    return sorted(names, key=lambda name: (rank.get(name.split("/")[0], len(rank)), name))


def _table(title: str, columns: Mapping[str, str], metrics: Mapping[str, float], names: Sequence[str]) -> ScoreTable:
    rows = {name: {label: score_cell(metrics, label, name) for label in columns} for name in names}
    return ScoreTable(title, columns, rows)


def score_cell(metrics: Mapping[str, float], label: str, name: str) -> Cell:
    """The score `eval/LABEL/NAME` as text."""
    value = metrics.get(f"eval/{label}/{name}")
    keys = (f"eval/{label}_lower/{name}", f"eval/{label}_upper/{name}")
    bounds = [metrics[key] for key in keys if key in metrics]
    if value is None:
        return Cell(_DASH)
    if label in ("questions", "subjects"):
        return Cell(f"{value:.0f}")
    if label.startswith("error"):
        return Cell(f"{value:.3g}", " to ".join(f"{bound:.3g}" for bound in bounds))
    interval = " to ".join(f"{100 * bound:.0f}" for bound in bounds)
    return Cell(f"{100 * value:.1f} %", interval and f"{interval} %")


def _with_interval(cell: Cell) -> str:
    return f"{cell.value} ({cell.note.removesuffix(' %')})" if cell.note else cell.value


def _align(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content, the first one left-aligned; headings are wrapped to several lines."""
    widths = [max(*map(len, cells), *map(len, head.split())) for head, *cells in zip(headings, *rows, strict=True)]
    folded = [wrap(heading, width) for heading, width in zip(headings, widths, strict=True)]
    height = max(map(len, folded))
    above = zip(*([""] * (height - len(words)) + words for words in folded), strict=True)
    return "\n".join(
        "  ".join(f"{cell:>{width}}" if place else f"{cell:<{width}}" for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (*above, *rows))
    )
