"""The page and what it says about the run: its modalities, the questions that it was asked, and its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from umbrella_data.modality import find_modality
from umbrella_data.viewer import viewer_script
from umbrella_train.evaluation.score_table import OVERLAP_MARK, OVERLAP_NOTE
from umbrella_train.report.run_data import RunData, read_run
from umbrella_train.report.tables import tiles
from umbrella_train.report.templates import find_template

_MAX_QUESTIONS = 12


def render_page(folder: Path, *, modalities: Sequence[str], max_bytes: int) -> str:
    """The HTML of the page.

    Args:
        folder: A run's folder, or one with a model alone: without suggested questions and scores.
        modalities: Those of the model.
        max_bytes: The most bytes of a scan.

    Raises:
        RunError: The files of the run cannot be read.
    """
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    run = read_run(folder, name=name) if (folder / "config.yaml").is_file() else None
    scores = tiles(run) if run else []
    specs = [find_modality(modality) for modality in modalities]
    return find_template("app.html.j2").render(
        name=name,
        specs=specs,
        tiles=scores,
        overlap_note=OVERLAP_NOTE if any(OVERLAP_MARK in score["value"] for score in scores) else "",
        facts={
            "maxBytes": max_bytes,
            "modalities": {
                spec.name: {"isSeries": spec.is_series, "channels": spec.channels, "description": spec.description}
                for spec in specs
            },
            "questions": _questions(run) if run else {},
        },
    )


def render_viewer(viewer: str) -> str:
    """The HTML of the viewer's own page, from that of the viewer."""
    return find_template("app_scan.html.j2").render(viewer=viewer)


def _questions(run: RunData) -> Mapping[str, Sequence[str]]:
    """The commonest questions of the newest evaluation, by modality."""
    counts: dict[str, Counter[str]] = {}
    for row in run.own_predictions:
        counts.setdefault(row.modality, Counter())[row.question] += 1
    return {name: [text for text, _ in found.most_common(_MAX_QUESTIONS)] for name, found in counts.items()}


def read_asset(name: str) -> bytes:
    """A file of the page: `app.js`, `app.css`, or `viewer.js`, which draws the scan."""
    if name == "viewer.js":
        return viewer_script().encode()
    return Path(__file__).with_name(name).read_bytes()
