"""The notebooks of the examples: kept without outputs, and run from an empty folder."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, values: str) -> dict[str, Any]:
    """Runs a notebook in a folder; returns variables at its end, and the text that each cell shows by its id."""
    import nbformat
    from nbclient import NotebookClient

    # Commands of the notebook are those of this environment; no cell may load anything from a network.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.delenv("DISPLAY", raising=False)
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({values}))"))
    NotebookClient(book, timeout=200, resources={"metadata": {"path": str(folder)}}).execute()
    shown = {cell["id"]: texts(cell) for cell in book.cells if cell.cell_type == "code"}
    *_, last = shown.values()
    return {**json.loads(last), "shown": shown}


def texts(cell: Any) -> str:
    """What a cell shows, without the messages on stderr."""
    parts = [each.get("text") or each.get("data", {}).get("text/plain", "") for each in cell.outputs]
    kinds = [each.get("name") for each in cell.outputs]
    return "".join(part for part, kind in zip(parts, kinds, strict=True) if kind != "stderr")


def test_there_is_a_row_for_each_notebook():
    rows = re.findall(r"^\| \[(\S+\.ipynb)\]\(\1\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [path.name for path in NOTEBOOKS]
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_no_paths_of_a_machine(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [(cell["outputs"], cell["execution_count"], cell["metadata"]) for cell in cells] == [([], None, {})] * len(
        cells
    )
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    source = "".join("".join(cell["source"]) for cell in book["cells"])
    assert re.findall(r"""(?:^|["'\s=])(?:/|~/|[A-Z]:\\)\w+""", source) == []


@pytest.mark.examples
def test_read_scans(tmp_path, monkeypatch):
    values = '{"reason": reason, "shape": list(prepared.shape), "tags": tags, "positions": positions}'
    found = run("read_scans", tmp_path, monkeypatch, values=values)
    assert found["reason"] == "gzip_truncated"
    assert found["shape"] == [1, 32, 32, 32]
    assert (found["tags"], found["positions"]) == ([[0, 1], [0, 2], [0, 3]], [64, 54, 27])
    assert found["shown"]["load"] == "((1, 40, 40, 40), (5.0, 5.0, 5.0))"
    assert "[gzip_truncated]" in found["shown"]["rejected"]
    assert found["shown"]["picture"].startswith("<Figure")
    assert "rsfMRI: (1, 1, 24, 24, 24, 8)\n" in found["shown"]["batch"]


@pytest.mark.examples
def test_train_and_ask(tmp_path, monkeypatch):
    values = (
        '{"losses": losses, "terms": list(out.dummy_terms), "norms": norms, "answer": answer, "accuracy": accuracy}'
    )
    found = run("train_and_ask", tmp_path, monkeypatch, values=values)
    losses = list(found["losses"].values())
    assert losses[-1] < losses[0] / 4
    assert found["terms"] == ["rsfMRI", "dMRI"]
    norms = found["norms"]
    assert [norms["rsfMRI"], norms["dMRI"]] == pytest.approx([1e-7, 1e-7], rel=0.01)
    assert norms["T1"] > 1e-5
    assert found["answer"] in ("left", "right")
    assert len(found["accuracy"]) == 3
    # As the text says: too few steps for all three.
    assert min(found["accuracy"].values()) < 0.75
    assert "grad/[inactive]/vision_tower.T1_patch_embed" in found["shown"]["gradients"]


@pytest.mark.examples
def test_compare_runs(tmp_path, monkeypatch):
    found = run("compare_runs", tmp_path, monkeypatch, values="figures")
    name = "dMRI/fibre_damage_side"
    assert found[f"against/subjects/{name}"] == 20
    assert found[f"against/accuracy_first/{name}"] > 0.9
    assert found[f"against/accuracy_second/{name}"] < 0.8
    assert 0 < found[f"against/accuracy_lower/{name}"] < found[f"against/accuracy/{name}"]
    shown = found["shown"]
    assert shown["figures"].count(": the runs differ\n") == 2
    assert name in shown["against"]
    assert shown["report"].endswith("True\n")
