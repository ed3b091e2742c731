"""The benchmarks keep their figures when a variant or a part fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("too large")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.mark.usefixtures("tools")
def test_a_variant_that_runs_out_of_memory_is_skipped() -> None:
    from step_measure import check_equal, ratio, time_alternately

    options = argparse.Namespace(clock="cpu", device="cpu", repeats=1, dtype="float32")
    check_equal({"ours": out_of_memory, "theirs": lambda: torch.ones(())}, options)
    check_equal({"ours": out_of_memory}, options)
    with pytest.raises(SystemExit, match="losses differ"):
        check_equal({"ours": out_of_memory, "a": lambda: torch.ones(()), "b": lambda: torch.zeros(())}, options)
    results = time_alternately({"ours": out_of_memory, "theirs": lambda: None}, options)
    assert list(results) == ["theirs"]
    assert ratio(results, "theirs", to="ours") is None
    assert ratio({"a": (6.0, 0), "b": (2.0, 0)}, "a", to="b") == 3


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("skipped", ["ours", "random batches of 8"])
def test_a_section_continues_without_its_baseline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, skipped: str
) -> None:
    import bench_step

    section = "T1" if skipped == "ours" else "mixed"

    def all_but_one(steps: Any, options: Any) -> dict[str, tuple[float, float]]:
        return {name: (1.0, 1.0) for name in steps if name != skipped}

    monkeypatch.setattr(bench_step, "time_alternately", all_but_one)
    arguments = ["--size", "tiny", "--batch-size", "1", "--pool", "2", "--peak-tflops", "1", "--presets", "align"]
    monkeypatch.setattr(sys, "argv", ["", "--sections", section, "--json", str(tmp_path / "a.json"), *arguments])
    bench_step.main()
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert len(figures) == (2 if skipped == "ours" else 3)


@pytest.mark.usefixtures("tools")
def test_figures_are_kept_and_other_sections_run_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_step

    def fails(section: str, *_: Any) -> Any:
        yield {"section": section}
        out_of_memory()

    def works(section: str, *_: Any) -> Any:
        assert json.loads((tmp_path / "a.json").read_text())["figures"] == [{"section": "T1"}]
        yield {"section": section}

    monkeypatch.setattr(bench_step, "SECTIONS", {"T1": fails, "mixed": works})
    arguments = ["--peak-tflops", "1", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit, match="out of memory: T1"):
        bench_step.main()
    assert json.loads((tmp_path / "a.json").read_text())["figures"] == [{"section": "T1"}, {"section": "mixed"}]


@pytest.mark.parametrize(("failing", "device"), [("bench_step", "cpu"), ("float32", "cuda"), ("nothing", "cpu")])
def test_bench_gpu_runs_every_part_and_lists_failures(tmp_path: Path, failing: str, device: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *{failing}*) exit 7;; esac\n')
    python.chmod(0o700)
    ran = subprocess.run(
        ["bash", str(TOOLS / "bench_gpu.sh"), str(tmp_path / "figures")],
        env={**os.environ, "PYTHON": str(python), "DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    assert len((tmp_path / "calls").read_text().splitlines()) == (3 if device == "cpu" else 9)
    assert ran.returncode == (0 if failing == "nothing" else 1)
    assert (failing in ran.stderr) == (failing != "nothing")
