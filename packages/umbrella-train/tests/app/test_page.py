"""What the page says about a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from umbrella_train.app.page import render_page
from umbrella_train.app.server import known_files
from umbrella_train.evaluation.predictions import Prediction
from umbrella_train.evaluation.score_table import OVERLAP_NOTE

ROW: dict[str, Any] = {
    **dict.fromkeys(Prediction.__dataclass_fields__),
    **{"subject": "a", "task": "sex", "modality": "T1", "condition": "accuracy", "question": "Which sex?"},
    **{"type": "choice", "options": ["female", "male"], "answer": "male", "is_parsed": True},
}


def facts_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def test_questions_of_the_newest_evaluation_are_suggested_by_modality(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "subject": "b"},
        {**ROW, "question": "</script>?"},
        {**ROW, "question": "How old?", "modality": "rsfMRI"},
        {**ROW, "question": "Not asked", "condition": "no_scan"},
    ]
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"questions": 2, "subjects": 2, "accuracy": 0.5, "accuracy_lower": 0.1, "accuracy_upper": 0.9}
    metrics = {f"eval/{label}/T1/sex": value for label, value in figures.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **metrics}) + "\n")
    page = render_page(tmp_path, modalities=["T1", "rsfMRI"], max_bytes=5)
    facts = facts_of(page)
    assert facts["questions"] == {"T1": ["Which sex?", "</script>?"], "rsfMRI": ["How old?"]}
    assert facts["maxBytes"] == 5
    assert {name: fact["isSeries"] for name, fact in facts["modalities"].items()} == {"T1": False, "rsfMRI": True}
    assert "T1 · sex: " in page
    assert "2 subjects, 95 % interval" in page


@pytest.mark.parametrize("control", [0.2, 0.6])
def test_a_mark_of_a_score_is_explained(tmp_path: Path, control: float) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    figures = {"questions": 9, "subjects": 9, "accuracy": 0.7, "accuracy_lower": 0.5, "accuracy_upper": 0.9}
    figures |= {"shuffled": control, "shuffled_lower": control - 0.1, "shuffled_upper": control + 0.1}
    metrics = {f"eval/{label}/T1/sex": value for label, value in figures.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **metrics}) + "\n")
    page = render_page(tmp_path, modalities=["T1"], max_bytes=5)
    assert ("70.0 %*" in page, page.count(OVERLAP_NOTE)) == ((True, 1) if control > 0.5 else (False, 0))


def test_a_model_alone_has_a_page_with_the_name_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "my-run" / "model").mkdir(parents=True)
    page = render_page(tmp_path / "my-run" / "model", modalities=["T1"], max_bytes=5)
    assert "<h1>my-run</h1>" in page
    assert "Not a medical device" in page
    assert "Scores" not in page
    assert facts_of(page)["questions"] == {}


def test_a_scan_has_the_files_that_its_modality_needs() -> None:
    nifti = {"scan.nii", "scan.nii.gz", "mask.nii", "mask.nii.gz"}
    assert set(known_files("T1w")) == nifti
    assert set(known_files("rsfMRI")) == nifti | {"scan.json"}
    assert set(known_files("dMRI")) == nifti | {"map-2.nii", "map-2.nii.gz", "scan.bval", "scan.bvec"}
