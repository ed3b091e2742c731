"""The check of a finished demo run finds figures that are not those of a model that uses its scans."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def figures() -> dict[str, float]:
    """Those of a demo run as it should be."""
    found: dict[str, float] = {}
    for modality in ("T1", "rsfMRI", "dMRI"):
        values = {"subjects": 64, "accuracy": 1.0, "auroc": 1.0, "auroc_swapped": 0.0, "swapped": 0.0}
        values |= {"chance_lower": 0.375, "chance_upper": 0.625}
        for control in ("shuffled", "no_scan"):
            values |= {control: 0.5, f"auroc_{control}": 0.45}
            values |= {f"auroc_{control}_lower": 0.3, f"auroc_{control}_upper": 0.6}
        found |= {f"eval/{label}/{modality}": value for label, value in values.items()}
    return found


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"eval/subjects/T1": 63}, "T1: 63 held-out subjects"),
        ({"eval/accuracy/dMRI": 0.9}, "dMRI: accuracy"),
        ({"eval/no_scan/T1": 0.7}, "T1: no_scan"),
        ({"eval/swapped/rsfMRI": 0.7}, "rsfMRI: swapped"),
        ({"eval/auroc/dMRI": 0.98}, "dMRI: AUROC 0.980"),
        ({"eval/auroc_shuffled_lower/T1": 0.51}, "T1: AUROC of shuffled"),
        ({"eval/auroc_no_scan_upper/T1": 0.49}, "T1: AUROC of no_scan"),
        ({"eval/auroc_swapped/T1": 0.6}, "T1: AUROC of swapped"),
    ],
)
def test_figures_that_do_not_depend_on_the_scan_are_found(
    changed: dict[str, float], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import check_demo

    (tmp_path / "metrics.jsonl").write_text(json.dumps(figures() | changed) + "\n", encoding="utf-8")
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(sys, "argv", ["check_demo.py", str(tmp_path)])
    assert check_demo.main() == (problem is not None)
    problems = check_demo.find_problems(figures() | changed)
    assert [each.startswith(problem or "") for each in problems] == [True] * (problem is not None)
