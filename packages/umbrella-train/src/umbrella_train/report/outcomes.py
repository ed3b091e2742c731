"""Figures of single answers: confusion matrix, reliability curve, and predicted against true numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umbrella_train.evaluation.classification import confusion_matrix, reliability_curve
from umbrella_train.evaluation.metrics import class_probabilities
from umbrella_train.evaluation.predictions import Prediction
from umbrella_train.report.figure_style import GREY, modality_colours, panels
from umbrella_train.report.run_data import RunData, label_of

# Larger matrices are not readable in half a page's width.
_MAX_OPTIONS = 12
_MAX_LABEL = 20


def has_outcomes(run: RunData) -> bool:
    """Whether there is something to draw."""
    return any(_groups(run))


def outcomes_figure(run: RunData) -> Figure:
    """One row for each task: confusion matrix and reliability curve, or predicted against true numbers."""
    choices, numbers = _groups(run)
    num_rows = len(choices) + -(-len(numbers) // 2)
    figure, axes = panels(num_rows, 2, height=2.8 * num_rows)
    colours = modality_colours(run.modalities, [name.split("/")[0] for name in (*choices, *numbers)])
    for row, (name, members) in enumerate(choices.items()):
        _draw_confusion(axes[2 * row], members, title=label_of(name))
        _draw_reliability(axes[2 * row + 1], members, colour=colours[name.split("/")[0]])
    rest = axes[2 * len(choices) :]
    for panel, (name, members) in zip(rest, numbers.items(), strict=False):
        _draw_numbers(panel, members, title=label_of(name), colour=colours[name.split("/")[0]])
    for panel in rest[len(numbers) :]:
        panel.set_axis_off()
    return figure


def _groups(run: RunData) -> tuple[dict[str, list[Prediction]], dict[str, list[Prediction]]]:
    """Predictions of choices with probabilities, and of numbers, by name."""
    by_name: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in run.own_predictions:
        by_name[prediction.name].append(prediction)
    choices = {name: members for name, members in by_name.items() if _is_drawn(members)}
    numbers = {
        name: members
        for name, members in by_name.items()
        if members[0].type == "number" and any(p.predicted is not None for p in members)
    }
    return choices, numbers


def _is_drawn(members: Sequence[Prediction]) -> bool:
    return (
        members[0].type == "choice" and len(members[0].options) <= _MAX_OPTIONS and bool(class_probabilities(members))
    )


def _draw_confusion(axes: Axes, members: Sequence[Prediction], *, title: str) -> None:
    found = class_probabilities(members)
    assert found is not None
    options, probabilities = found
    counts = confusion_matrix([str(p.answer) for p in members], probabilities, options=options)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour)
    labels = [shorten(option, _MAX_LABEL, placeholder=" …") for option in options]
    is_wide = sum(map(len, labels)) > _MAX_LABEL
    axes.set_xticks(range(len(options)), labels, rotation=20 if is_wide else 0, ha="right" if is_wide else "center")
    axes.set_yticks(range(len(options)), labels)
    axes.set_xlabel("likeliest option")
    axes.set_ylabel("right answer")
    axes.grid(visible=False)
    axes.set_title(f"{title}: confusion matrix")


def _draw_reliability(axes: Axes, members: Sequence[Prediction], *, colour: str) -> None:
    found = class_probabilities(members)
    assert found is not None
    options, probabilities = found
    curve = reliability_curve([str(p.answer) for p in members], probabilities, options=options)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    axes.plot([point.probability for point in curve], [point.accuracy for point in curve], color=colour, marker="o")
    for point in curve:
        axes.annotate(
            str(point.count), (point.probability, point.accuracy), xytext=(5, -10), textcoords="offset points", size=8
        )
    axes.set_xlim(1 / len(options) - 0.05, 1.05)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("probability of the likeliest option")
    axes.set_ylabel("right answers")
    axes.set_title("calibration (beside a point: number of questions)")


def _draw_numbers(axes: Axes, members: Sequence[Prediction], *, title: str, colour: str) -> None:
    read = [p for p in members if p.predicted is not None]
    answers = [float(p.answer) for p in read]
    predicted = [float(p.predicted) for p in read if p.predicted is not None]
    span = [min(answers + predicted), max(answers + predicted)]
    axes.plot(span, span, color=GREY, linewidth=1, linestyle="--")
    for answer, prediction in zip(answers, read, strict=True):
        if prediction.interval is not None:
            axes.plot([answer, answer], prediction.interval, color=colour, linewidth=1, alpha=0.35)
    axes.plot(answers, predicted, "o", color=colour, markersize=4)
    unit = f" ({read[0].unit})" if read[0].unit else ""
    axes.set_xlabel(f"right answer{unit}")
    axes.set_ylabel(f"predicted{unit}")
    axes.set_title(f"{title}: lines are 80 % intervals")
