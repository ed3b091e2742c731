"""Modules of umbrella_train that import both umbrella_data and umbrella_model."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import umbrella_train

# These build, save and use data and model together; every other module imports at most one of the two.
MEETING_PLACES = {
    "assembly.build",
    "assembly.predict",
    "assembly.trained_model",
    "batches.collators",
    "processor",
}


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports, also in functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def test_few_modules_import_both_data_and_model():
    root = Path(str(files(umbrella_train)))
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    assert len(paths) > 50
    both = {"umbrella_data", "umbrella_model"}
    assert {name for name, path in paths.items() if both <= imported_packages(path)} == MEETING_PLACES
