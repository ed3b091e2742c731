"""Style, colours and legend marks of the report's figures, and figures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's palette, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a7a00", "#333333")
GREY = "#8b949e"
INK = "#24292f"
WIDTH = 9.2  # inches

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#57606a",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": "#eaeef2",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.frameon": False,
    # Names of tasks and options may have dollar signs.
    "text.parse_math": False,
    # Makes the SVG reproducible.
    "svg.hashsalt": "umbrella",
}


def draw(figure: Callable[[], Figure]) -> str:
    """Draw a figure in the report's style and return it as a data URI (SVG)."""
    with mpl.rc_context(_STYLE):
        stream = io.BytesIO()
        figure().savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def panels(num_rows: int, num_columns: int, *, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width with its panels, row by row; the height is in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """One colour per name, in order."""
    return {name: COLOURS[position % len(COLOURS)] for position, name in enumerate(names)}


def modality_colours(configured: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """One colour per modality, by the order of the config, so that it is the same in all figures of a run."""
    return colours_of(list(dict.fromkeys([*configured, *sorted(found)])))


def use_log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose labels are plain text, such as 1e-05: formulas are off, since names may hold a $."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def mark(marker: str, colour: str, label: str, *, is_filled: bool) -> Line2D:
    """An entry of a legend."""
    fill = colour if is_filled else "white"
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=fill, linestyle="none", label=label)
