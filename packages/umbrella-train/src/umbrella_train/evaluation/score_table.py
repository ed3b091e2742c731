"""Tables of scores with their intervals, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from umbrella_train.evaluation.comparison import BASELINE_COLUMNS, baseline_metrics, better_baselines, has_overlap

_CONTROLS = {"shuffled": "another's scan", "swapped": "other answer's scan", "no_scan": "no scan"}
_COUNTS = {"unparsed": "unreadable", "questions": "questions", "subjects": "subjects"}
OVERLAP_MARK = "*"
OVERLAP_NOTE = "* its 95 % interval overlaps that of a control or a baseline"
NO_INTERVAL = "no interval"
"""The note of a main figure that has none, as from one subject: it is never marked, and shows nothing."""
DASH = "–"
"""A cell without a value."""
_PERCENT = frozenset({"accuracy", "chance", "majority", "unparsed", *_CONTROLS})
_COUNTED = frozenset({"questions", "subjects"})


@dataclass(frozen=True)
class TableKind:
    """A table of the scores of one answer type.

    Attributes:
        title: Name of the scores.
        needs: A label that every row has.
        columns: Headings by the label in a metric's key, `eval/LABEL/NAME`.
        own: Labels of the figures whose intervals are printed on the terminal.
    """

    title: str
    needs: str
    columns: Mapping[str, str]
    own: tuple[str, ...]


TABLES = (
    TableKind(
        title="right answers",
        needs="accuracy",
        columns={
            "accuracy": "own scan", "auroc": "AUROC", **_CONTROLS, "chance": "guessing", "majority": "commonest answer",
            **_COUNTS,
        },
        own=("accuracy", "auroc"),
    ),
    TableKind(
        title="mean error",
        needs="error_constant",
        columns={
            "error": "own scan", "r2": "R²", "error_generated": "as text",
            **{f"error_{label}": heading for label, heading in _CONTROLS.items()},
            "error_constant": "best constant guess", **_COUNTS,
        },
        own=("error", "r2"),
    ),
    TableKind(
        title="texts",
        needs="token_f1",
        columns={
            "exact_match": "exact match", "token_f1": "token F1", "rouge_l": "ROUGE-L",
            "laterality_f1": "left/right F1",
            **{f"token_f1_{label}": f"F1, {heading}" for label, heading in _CONTROLS.items()}, **_COUNTS,
        },
        own=("token_f1",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A score as text.

    Attributes:
        value: The value, or a dash.
        note: Its 95 % interval; `NO_INTERVAL`, or empty beside the main figures, if it has none.
    """

    value: str
    note: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one kind.

    Attributes:
        kind: Title and columns.
        rows: A cell for each column, by the name of a task (`T1/sex`), or of a baseline below it (`T1/sex volume`).
        baselines: Names of the rows that are of a baseline, with the baseline.
        remarks: A sentence for each task in which a baseline is better.
    """

    kind: TableKind
    rows: Mapping[str, Mapping[str, Cell]]
    baselines: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @property
    def has_overlap(self) -> bool:
        """Whether a figure is marked."""
        return any(cell.value.endswith(OVERLAP_MARK) for row in self.rows.values() for cell in row.values())

    def to_text(self) -> str:
        """The table for a terminal, without empty columns, with intervals of the main figures; empty without rows."""
        if not self.rows:
            return ""
        own = self.kind.own
        # `questions` is left out: the intervals count subjects.
        labels = [label for label in self.kind.columns if label != "questions" and self._has(label)]
        lines = [
            [
                f"  {self.baselines[name]}" if name in self.baselines else name,
                *(_with_interval(row[label]) if label in own else row[label].value for label in labels),
            ]
            for name, row in self.rows.items()
        ]
        notes = [OVERLAP_NOTE] if self.has_overlap else []
        headings = [self.kind.columns[label] for label in labels]
        return "\n".join([_align([self.kind.title, *headings], lines), *notes, *self.remarks])

    def _has(self, label: str) -> bool:
        """Whether a column has values; `unparsed` needs unreadable answers."""
        empty = {DASH, "0.0 %"} if label == "unparsed" else {DASH}
        return any(row[label].value not in empty for row in self.rows.values())


def score_table(metrics: Mapping[str, float]) -> str:
    """The main scores of `summarise` as text, with baselines below; `metrics.jsonl` has all of them.

    Returns:
        A table for each answer type. Empty without scores.
    """
    tables = (build_table(kind, metrics).to_text() for kind in TABLES)
    return "\n\n".join(table for table in tables if table)


def build_table(kind: TableKind, metrics: Mapping[str, float], modalities: Sequence[str] = ()) -> ScoreTable:
    """The scores of one answer type, one row for each task and baseline; rows as in `names_below`."""
    rows: dict[str, dict[str, Cell]] = {}
    baselines: dict[str, str] = {}
    remarks: list[str] = []
    names = [name for name in names_below(metrics, kind.needs, modalities) if "/" in name]
    for name in names:
        cells = {label: score_cell(metrics, label, name) for label in kind.columns}
        bare = [label for label in kind.own if cells[label] != Cell(DASH) and not cells[label].note]
        rows[name] = cells | {label: Cell(cells[label].value, NO_INTERVAL) for label in bare}
        for baseline, figures in baseline_metrics(metrics, name).items():
            row = f"{name} {baseline}"
            baselines[row] = baseline
            rows[row] = {
                label: score_cell(figures, label, name) if label in BASELINE_COLUMNS else Cell(DASH)
                for label in kind.columns
            }
        remarks += [f"{name}: {remark}" for remark in better_baselines(metrics, name)]
    return ScoreTable(kind, rows, baselines, remarks)


def names_below(metrics: Mapping[str, float], label: str, modalities: Sequence[str] = ()) -> list[str]:
    """The names below `eval/LABEL/`: modalities (`T1`), in the given order, each before its tasks (`T1/sex`)."""
    prefix = f"eval/{label}/"
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    rank = {name: position for position, name in enumerate(modalities)}
    return sorted(names, key=lambda name: (rank.get(name.split("/")[0], len(rank)), name))


def score_cell(metrics: Mapping[str, float], label: str, name: str) -> Cell:
    """The score `eval/LABEL/NAME` as text, with a mark if it is not clearly better than a control or a baseline."""
    value = metrics.get(f"eval/{label}/{name}")
    keys = (f"eval/{label}_lower/{name}", f"eval/{label}_upper/{name}")
    bounds = [metrics[key] for key in keys if metrics.get(key) is not None]
    if value is None:
        return Cell(DASH)
    if label in _COUNTED:
        return Cell(f"{value:.0f}")
    mark = OVERLAP_MARK if has_overlap(metrics, label, name) else ""
    if label in _PERCENT:
        interval = " to ".join(f"{100 * bound:.0f}" for bound in bounds)
        return Cell(f"{100 * value:.1f} %{mark}", interval and f"{interval} %")
    show = short if label.startswith(("error", "rmse")) else "{:.2f}".format
    return Cell(f"{show(value)}{mark}", " to ".join(map(show, bounds)))


def short(value: float) -> str:
    """A number with 3 digits, or as an integer if it has more before the point: no `1.23e+04`."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"


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
