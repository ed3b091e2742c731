"""Which modules of umbrella_train know both data and model. Whether these know each other is import-linter's to say."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import umbrella_train

# What joins the two is built, saved and asked in these; every other module leans on one side alone.
MEETING_PLACES = {"assembly.build", "assembly.predict", "assembly.trained_model", "batches.collators", "processor"}


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def test_data_and_model_meet_in_few_modules():
    root = Path(str(files(umbrella_train)))
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    assert len(paths) > 50
    both = {"umbrella_data", "umbrella_model"}
    assert {name for name, path in paths.items() if both <= imported_packages(path)} == MEETING_PLACES
