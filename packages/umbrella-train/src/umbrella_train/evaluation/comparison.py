"""Compares figures with their controls and baselines, by intervals and values in the metrics."""

from __future__ import annotations

from collections.abc import Mapping

Metrics = Mapping[str, float]

CONTROLS = ("shuffled", "swapped", "no_scan")
SMALLER_IS_BETTER = frozenset({"error", "rmse", "brier", "calibration_error"})
COMPARED = {"auroc": "AUROC", "accuracy": "accuracy", "error": "mean error", "r2": "R²", "token_f1": "token F1",
            "exact_match": "exact match"}  # fmt: skip
"""Figures that are compared with controls and baselines; of a task, the first one that it has is its main figure."""

BASELINE_COLUMNS = frozenset({"accuracy", "auroc", "error", "r2"})


def control_label(figure: str, condition: str) -> str:
    """The label of a figure under a condition, as in `auroc_shuffled`; the controls of `accuracy` have no prefix."""
    if condition == "accuracy":
        return figure
    return condition if figure == "accuracy" else f"{figure}_{condition}"


def baseline_metrics(metrics: Metrics, name: str) -> dict[str, dict[str, float]]:
    """The figures `baseline/BASELINE/LABEL/NAME` of a task by baseline, with keys as those of the model."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        kind, *parts = key.split("/", 3)  # a name may have more slashes
        if kind == "baseline" and len(parts) == 3 and parts[2] == name:
            found.setdefault(parts[0], {})[f"eval/{parts[1]}/{name}"] = value
    return found


def has_overlap(metrics: Metrics, label: str, name: str) -> bool:
    """Whether the interval of a figure overlaps that of one of its controls or of a baseline."""
    if label not in COMPARED:
        return False
    own = _interval(metrics, label, name)
    others = [_interval(metrics, control_label(label, control), name) for control in CONTROLS]
    others += [_interval(figures, label, name) for figures in baseline_metrics(metrics, name).values()]
    return own is not None and any(other is not None and not _is_better(own, other, label) for other in others)


def num_overlaps(metrics: Metrics, name: str) -> int | None:
    """The number of controls whose interval overlaps that of a task's main figure; None without controls."""
    main = next((label for label in COMPARED if f"eval/{label}/{name}" in metrics), None)
    own = None if main is None else _interval(metrics, main, name)
    if main is None or own is None:
        return None
    others = [_interval(metrics, control_label(main, control), name) for control in CONTROLS]
    known = [other for other in others if other is not None]
    return sum(not _is_better(own, other, main) for other in known) if known else None


def better_baselines(metrics: Metrics, name: str) -> list[str]:
    """A sentence about each figure of a task in which baselines are better than the model."""
    remarks = []
    baselines = baseline_metrics(metrics, name)
    for label, title in COMPARED.items():
        key = f"eval/{label}/{name}"
        sign = -1 if label in SMALLER_IS_BETTER else 1
        better = {
            baseline: figures[key]
            for baseline, figures in baselines.items()
            if key in figures and key in metrics and sign * figures[key] > sign * metrics[key]
        }
        if better:
            listed = ", ".join(f"{baseline} {value:.3g}" for baseline, value in sorted(better.items()))
            remarks.append(f"{title} {metrics[key]:.3g} is worse than that of the baselines {listed}")
    return remarks


def _interval(metrics: Metrics, label: str, name: str) -> tuple[float, float] | None:
    lower, upper = (metrics.get(f"eval/{label}_{side}/{name}") for side in ("lower", "upper"))
    return None if lower is None or upper is None else (lower, upper)


def _is_better(one: tuple[float, float], other: tuple[float, float], label: str) -> bool:
    """Whether an interval is wholly on the better side of another one."""
    return one[1] < other[0] if label in SMALLER_IS_BETTER else one[0] > other[1]
