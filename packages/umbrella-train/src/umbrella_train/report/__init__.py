"""The report: one HTML file, built only from the files of a run folder, of one run or several, also crashed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umbrella_data.files.atomic import write_atomically
from umbrella_train.report.page import render
from umbrella_train.report.run_data import read_run

__all__ = ["build_report"]


def build_report(run_dirs: Sequence[Path], *, output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        run_dirs: The folders of the runs.
        output: The file to write; default: report.html in the run's folder, or comparison.html next to the first of
            several.

    Returns:
        The file.

    Raises:
        RunError: If a folder is not a run's folder.
    """
    folders = [path.resolve() for path in run_dirs]
    names = [folder.name for folder in folders]
    # Runs with the same name are distinguished by their parent folder.
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else folders[0].parent / "comparison.html"
    write_atomically(output, [render(runs).encode()])
    return output
