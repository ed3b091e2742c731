"""Figures of answers: each question with its controls and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from umbrella_train.report.figure_style import GREY, INK, colours_of, mark, modality_colours, panels
from umbrella_train.report.run_data import RunData, label_of

CONTROLS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "shuffled": ("s", "another subject's scan"),
        "swapped": ("^", "a scan with another answer"),
        "no_scan": ("D", "no scan"),
    }
)
"""Marker and label of each control."""

_LANE = 0.2
_HALF_ROW = 0.42


def accuracy_figure(runs: Sequence[RunData]) -> Figure:
    """Accuracy of every question with its controls, and the interval of guessing as a band."""
    names = dict.fromkeys(name for run in runs for name in run.names_below("accuracy") if "/" in name)
    rows = [(run, name) for name in names for run in runs if f"eval/accuracy/{name}" in run.evaluation]
    figure, (axes,) = panels(1, 1, height=1.4 + 0.8 * len(rows))
    by_modality = modality_colours(runs[0].modalities, [name.split("/")[0] for name in names])
    by_run = colours_of([run.name for run in runs])
    for position, (run, name) in enumerate(rows):
        _draw_guessing(axes, run.evaluation, name=name, position=position)
        colour = by_modality[name.split("/")[0]] if len(runs) == 1 else by_run[run.name]
        _draw_lanes(axes, run.evaluation, prefix="", name=name, position=position, colour=colour)
    several = len(runs) > 1
    axes.set_yticks(range(len(rows)), [label_of(name) + (f"\n{run.name}" if several else "") for run, name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("right answers")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    band = Line2D([], [], color="#afb8c1", linewidth=7, alpha=0.5, label="guessing")
    figure.legend(handles=[*_legend(), band], loc="outside upper center", ncols=5, columnspacing=1.2)
    return figure


def error_figure(runs: Sequence[RunData]) -> Figure:
    """Mean absolute error of every question about a number, with its controls; one panel per question."""
    names = list(dict.fromkeys(name for run in runs for name in run.names_below("error")))
    runs_of = {name: [run for run in runs if f"eval/error/{name}" in run.evaluation] for name in names}
    figure, axes = panels(len(names), 1, height=1.0 + sum(0.6 + 0.8 * len(members) for members in runs_of.values()))
    by_run = colours_of([run.name for run in runs])
    for panel, (name, members) in zip(axes, runs_of.items(), strict=True):
        for position, run in enumerate(members):
            colour = by_run[run.name]
            _draw_lanes(panel, run.evaluation, prefix="error", name=name, position=position, colour=colour)
        panel.set_yticks(range(len(members)), [run.name if len(runs) > 1 else "" for run in members])
        panel.set_ylim(len(members) - 0.4, -0.6)
        panel.set_xlim(left=0)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
        panel.set_title(label_of(name))
    axes[-1].set_xlabel("mean absolute error")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4)
    return figure


def _draw_guessing(axes: Axes, metrics: Mapping[str, float], *, name: str, position: int) -> None:
    chance = metrics.get(f"eval/chance/{name}")
    if chance is not None:
        span = [position - _HALF_ROW, position + _HALF_ROW]
        lower, upper = metrics[f"eval/chance_lower/{name}"], metrics[f"eval/chance_upper/{name}"]
        axes.fill_betweenx(span, lower, upper, color="#afb8c1", alpha=0.35, linewidth=0)
        axes.plot([chance, chance], span, color="#57606a", linewidth=1, linestyle="--")


def _draw_lanes(
    axes: Axes, metrics: Mapping[str, float], *, prefix: str, name: str, position: int, colour: str
) -> None:
    """Draw the value with the own scan (large, filled) and the controls below it, each with its interval."""
    labels = {prefix or "accuracy": ("o", colour)}
    labels |= {f"{prefix}_{control}".lstrip("_"): (marker, GREY) for control, (marker, _) in CONTROLS.items()}
    for lane, (label, (marker, lane_colour)) in enumerate(labels.items()):
        value = metrics.get(f"eval/{label}/{name}")
        if value is None:
            continue
        height = position + (lane - (len(labels) - 1) / 2) * _LANE
        # A figure of one subject has no interval.
        bounds = [metrics.get(f"eval/{label}_{side}/{name}", value) for side in ("lower", "upper")]
        is_own = lane == 0
        axes.plot(bounds, [height, height], color=lane_colour, linewidth=2.2 if is_own else 1.2)
        fill = lane_colour if is_own else "white"
        size = 8 if is_own else 5.5
        axes.plot([value], [height], marker, color=lane_colour, markerfacecolor=fill, markersize=size, clip_on=False)


def _legend() -> list[Line2D]:
    own = mark("o", INK, "its own scan", is_filled=True)
    return [own, *(mark(marker, GREY, label, is_filled=False) for marker, label in CONTROLS.values())]
