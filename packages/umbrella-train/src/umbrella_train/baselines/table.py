"""Tables of the scores of the baselines next to the model's."""

from __future__ import annotations

from collections.abc import Mapping

from umbrella_train.evaluation.score_table import ScoreTable, names_below, score_cell

_HEADINGS = {
    "constant": "constant", "text": "text only", "volume": "small volume", "histogram": "intensity histogram",
    "regions": "region volumes", "cnn": "small CNN",
}  # fmt: skip


def baseline_table(metrics: Mapping[str, float]) -> str:
    """The scores of `summarise_baselines`, and the model's of `summarise`, as text; empty without baselines.

    Returns:
        A table of right answers, one of mean errors, or both; a row for each task.
    """
    tables = (
        _table(title, label, metrics) for title, label in (("right answers", "accuracy"), ("mean error", "error"))
    )
    return "\n\n".join(text for table in tables if (text := table.to_text()))


def _table(title: str, label: str, metrics: Mapping[str, float]) -> ScoreTable:
    by_baseline: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, name, rest = (*key.split("/", 2), "", "")[:3]
        if prefix == "baseline":
            by_baseline.setdefault(name, {})[f"eval/{rest}"] = value
    tasks = sorted({task for scores in by_baseline.values() for task in names_below(scores, label) if "/" in task})
    columns = {"model": "model", **{name: heading for name, heading in _HEADINGS.items() if name in by_baseline}}
    scores_of = {"model": metrics, **by_baseline}
    rows = {task: {name: score_cell(scores_of[name], label, task) for name in columns} for task in tasks}
    return ScoreTable(title, columns, rows)
