"""Renders the page of the report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from umbrella_train.config import RunConfig
from umbrella_train.config.schema import annotation_at, without_none
from umbrella_train.evaluation.score_table import OVERLAP_NOTE
from umbrella_train.report import tables
from umbrella_train.report.answers import accuracy_figure, error_figure
from umbrella_train.report.curves import gradient_figure, loss_figure
from umbrella_train.report.figure_style import draw
from umbrella_train.report.outcomes import has_outcomes, outcomes_figure
from umbrella_train.report.run_data import RunData, gradient_norms
from umbrella_train.report.templates import find_template

_HIDDEN = "(see config.yaml)"


def render(runs: Sequence[RunData]) -> str:
    """The HTML of a report of one run, or several to compare; it needs no other file and no network."""
    configs = [without_paths(run.config) for run in runs]
    viewers = _viewers(runs)
    return find_template("report.html.j2").render(
        runs=runs,
        title=", ".join(run.name for run in runs),
        is_comparison=len(runs) > 1,
        answers_on=_answers_on(runs),
        figures=_figures(runs),
        tiles=tables.tiles(runs[0]) if len(runs) == 1 else [],
        overlap_note=OVERLAP_NOTE,
        tables=tables.score_tables(runs),
        pictures=_pictures(runs),
        viewers=viewers,
        viewer_script=_viewer_script() if viewers else "",
        examples=list(tables.examples(runs[0])) if len(runs) == 1 else [],
        facts=[(run.name, tables.facts(run)) for run in runs],
        differences=tables.differences(configs),
        configs=[
            (run.name, yaml.safe_dump(config, sort_keys=False)) for run, config in zip(runs, configs, strict=True)
        ],
    )


def _viewer_script() -> Markup:
    from umbrella_data.viewer import viewer_script  # late: imports torch

    return Markup(viewer_script())


def _answers_on(runs: Sequence[RunData]) -> str:
    """What the report's answers are about: nothing is called held out that was not compared."""
    states = {run.is_held_out for run in runs}
    if False in states:
        return "subjects that are not held out"
    return "evaluation subjects" if None in states else "held-out subjects"


def without_paths(content: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Copy a configuration without its paths, which must not leave the machine with a shared report."""
    if isinstance(content, Mapping):
        return {key: without_paths(value, (*path, str(key))) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value, (*path, position)) for position, value in enumerate(content)]
    # A checkpoint or tokenizer is the name of a repository on the hub or a folder.
    is_path = path and without_none(annotation_at(RunConfig, path)) is Path
    is_folder = path in {("model", "pretrained"), ("model", "tokenizer")} and Path(str(content)).is_absolute()
    return _HIDDEN if content is not None and (is_path or is_folder) else content


def _figures(runs: Sequence[RunData]) -> dict[str, str]:
    """Data URIs of the figures that have data."""
    figures = {}
    if any(run.training for run in runs):
        figures["loss"] = draw(lambda: loss_figure(runs))
    if any(gradient_norms(run.training) for run in runs):
        figures["gradients"] = draw(lambda: gradient_figure(runs, scale=_expected_norm(runs)))
    if any(run.names_below("accuracy") for run in runs):
        figures["accuracy"] = draw(lambda: accuracy_figure(runs))
    if any(run.names_below("error") for run in runs):
        figures["errors"] = draw(lambda: error_figure(runs))
    if len(runs) == 1 and has_outcomes(runs[0]):
        figures["outcomes"] = draw(lambda: outcomes_figure(runs[0]))
    return figures


def _expected_norm(runs: Sequence[RunData]) -> float | None:
    """Gradient norm that the dummy loss gives to an absent modality; None unless all runs have the same."""
    scales = set()
    for run in runs:
        section: Mapping[str, Any] = run.config.get("dummy_loss") or {}
        is_unit = section.get("enabled") and section.get("reduction") == "unit"
        scales.add(section.get("scale") if is_unit else None)
    return scales.pop() if len(scales) == 1 else None


def _pictures(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """Run, modality and data URI of each picture; identical pictures of several runs are shown once."""
    found: dict[str, tuple[str, str, str]] = {}
    for run in runs:
        for modality, path in run.pictures.items():
            uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            found.setdefault(uri + modality, (run.name, modality, uri))
    return list(found.values())


def _viewers(runs: Sequence[RunData]) -> list[tuple[str, str, Markup]]:
    """Run, modality and HTML of each scan to scroll through; identical ones of several runs are shown once."""
    found: dict[str, tuple[str, str, Markup]] = {}
    for run in runs:
        for modality, path in run.viewers.items():
            text = path.read_text(encoding="utf-8")
            found.setdefault(text + modality, (run.name, modality, Markup(text)))
    return list(found.values())
