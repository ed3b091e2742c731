"""The report: one HTML file, built only from the files of a run folder, of one run or several, also crashed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umbrella_data.files.atomic import write_atomically
from umbrella_train.report.folds import pool_folds
from umbrella_train.report.page import render
from umbrella_train.report.run_data import read_run
from umbrella_train.run_folder import fold_folders

__all__ = ["build_report"]


def build_report(run_dirs: Sequence[Path], *, output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        run_dirs: The folders of the runs. In that of a cross-validation, the folds are pooled first.
        output: The file to write; default: report.html in the run's folder, or comparison.html next to the first of
            several.

    Returns:
        The file.

    Raises:
        RunError: If a folder is not a run's folder, or folds cannot be pooled.
    """
    folders = [path.resolve() for path in run_dirs]
    for folder in filter(fold_folders, folders):
        pool_folds(folder)
    names = [folder.name for folder in folders]
    # Runs with the same name are distinguished by their parent folder.
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else folders[0].parent / "comparison.html"
    write_atomically(output, [render(runs).encode()])
    return output
