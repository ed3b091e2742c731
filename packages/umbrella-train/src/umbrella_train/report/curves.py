"""Figures over the optimizer steps: loss and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umbrella_train.report.figure_style import GREY, INK, colours_of, mark, modality_colours, panels, use_log_axis
from umbrella_train.report.run_data import GradientNorms, Points, RunData, gradient_norms, points

# More points only make the file larger.
MAX_POINTS = 1500


def loss_figure(runs: Sequence[RunData]) -> Figure:
    """Training loss of every run: logged values (pale), their running mean (strong), held-out losses (dots).

    One run alone also has the held-out loss of each set of modalities.
    """
    figure, (axes,) = panels(1, 1, height=3.4)
    if len(runs) == 1:
        _draw_loss(axes, runs[0], colour=INK, is_alone=True)  # the colours are those of modalities
        _draw_held_out_losses(axes, runs[0])
    else:
        for run, colour in zip(runs, colours_of([run.name for run in runs]).values(), strict=True):
            _draw_loss(axes, run, colour=colour, is_alone=False)
    drawn = [value for run in runs for value in points(run.training, "loss").values if math.isfinite(value)]
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        use_log_axis(axes)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(loc="upper right")
    return figure


def gradient_figure(runs: Sequence[RunData], *, scale: float | None) -> Figure:
    """Gradient norm of each modality's patch embed over the steps, one panel per modality, one logarithmic axis.

    One run is coloured by modality, several by run. `scale`, the expected norm of dummy gradients, is a line.
    """
    norms = [gradient_norms(run.training) for run in runs]
    modalities = _modalities(runs, norms)
    figure, axes = panels(1, len(modalities), height=3.2, sharey=True)
    by_modality = modality_colours(runs[0].modalities, modalities)
    by_run = colours_of([run.name for run in runs])
    for panel, modality in zip(axes, modalities, strict=True):
        for run, found in zip(runs, norms, strict=True):
            colour = by_modality[modality] if len(runs) == 1 else by_run[run.name]
            if modality in found:
                _draw_norms(panel, found[modality], colour=colour)
        if scale:
            panel.axhline(scale, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        use_log_axis(panel)
        panel.margins(y=0.1)
        panel.set_title(modality)
        panel.set_xlabel("optimizer step")
    axes[0].set_ylabel("gradient norm")
    marks = [mark("o", INK, "in the batch", is_filled=True)]
    marks.append(mark("o", GREY, "absent (dummy gradient)", is_filled=False))
    if len(runs) > 1:
        marks += [mark("o", colour, name, is_filled=True) for name, colour in by_run.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(4, len(marks)))
    return figure


def _draw_loss(axes: Axes, run: RunData, *, colour: str, is_alone: bool) -> None:
    logged = _thin(points(run.training, "loss"))
    axes.plot(logged.steps, logged.values, color=colour, alpha=0.3, linewidth=1)
    label = "training" if is_alone else run.name
    axes.plot(logged.steps, _smooth(logged.values), color=colour, linewidth=1.8, label=label)
    held_out = points(run.validation, "eval_loss")
    if held_out.steps:
        label = "held out" if is_alone else f"{run.name}, held out"
        axes.plot(
            held_out.steps, held_out.values, "o", color=colour, markerfacecolor="white", markersize=5, label=label
        )
    for step, value in zip(logged.steps, logged.values, strict=True):
        if not math.isfinite(value):
            axes.axvline(step, color="#cf222e", linewidth=1, alpha=0.6)


def _draw_held_out_losses(axes: Axes, run: RunData) -> None:
    prefix = "eval/loss/"
    names = sorted({key.removeprefix(prefix) for row in run.validation for key in row if key.startswith(prefix)})
    if len(names) > 1:
        colours = modality_colours(run.modalities, names)
        for name in names:
            found = points(run.validation, prefix + name)
            axes.plot(found.steps, found.values, ":", marker=".", color=colours[name], label=f"held out, {name}")


def _draw_norms(panel: Axes, norms: GradientNorms, *, colour: str) -> None:
    inactive, active = _thin(norms.inactive), _thin(norms.active)
    (hollow,) = panel.plot(inactive.steps, inactive.values, "o", color=GREY, markersize=3.8, markeredgewidth=0.8)
    hollow.set_markerfacecolor("white")
    panel.plot(active.steps, active.values, "o", color=colour, markersize=4.2, markeredgewidth=0)


def _modalities(runs: Sequence[RunData], norms: Sequence[dict[str, GradientNorms]]) -> list[str]:
    """All modalities that have norms, those of the configs first, in their order."""
    found = {name for one in norms for name in one}
    configured = [name for run in runs for name in run.modalities if name in found]
    return list(dict.fromkeys([*configured, *sorted(found)]))


def _thin(series: Points) -> Points:
    """At most `MAX_POINTS` points, evenly selected, with the first and the last."""
    if len(series.steps) <= MAX_POINTS:
        return series
    kept = np.unique(np.linspace(0, len(series.steps) - 1, MAX_POINTS).round().astype(int))
    return Points(tuple(series.steps[i] for i in kept), tuple(series.values[i] for i in kept))


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the points to either side; non-finite values are ignored."""
    array, reach = np.asarray(values, dtype=np.float64), max(1, len(values) // 20)
    windows = [array[max(0, i - reach) : i + reach + 1] for i in range(len(array))]
    means = [window[np.isfinite(window)] for window in windows]
    return [float(window.mean()) if len(window) else math.nan for window in means]
