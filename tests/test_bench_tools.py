"""The benchmarks keep their figures when a variant or a part fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("too large")


def figures(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert len(figures(tmp_path / "a.json")) == (2 if skipped == "ours" else 3)


@pytest.mark.usefixtures("tools")
def test_figures_are_kept_and_other_sections_run_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_step

    def fails(section: str, *_: Any) -> Any:
        yield {"section": section}
        out_of_memory()

    def works(section: str, *_: Any) -> Any:
        assert [figure["section"] for figure in figures(tmp_path / "a.json")] == ["T1"]
        yield {"section": section}

    monkeypatch.setattr(bench_step, "SECTIONS", {"T1": fails, "mixed": works})
    arguments = ["--peak-tflops", "1", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit, match="out of memory: T1"):
        bench_step.main()
    assert [figure["section"] for figure in figures(tmp_path / "a.json")] == ["T1", "mixed"]


@pytest.mark.usefixtures("tools")
def test_each_modality_has_its_batch_size_and_our_model_can_run_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_step

    arguments = ["--size", "tiny", "--presets", "align", "--batch-size", "2", "1", "--ours-only", "--compile", "eager"]
    monkeypatch.setattr(bench_step, "time_alternately", lambda steps, _: dict.fromkeys(steps, (0.5, 1.0)))
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--sections", "T1", "rsfMRI", "--json", str(tmp_path / "a")])
    monkeypatch.setattr(bench_step, "compile_layers", lambda model, *, backend: None)
    # An unknown card: without MFU.
    monkeypatch.setattr(bench_step, "find_peak", lambda _: None)
    bench_step.main()
    found = [(line["section"], line["batch size"], line["step"]) for line in figures(tmp_path / "a")]
    assert found == [(*each, step) for each in (("T1", 2), ("rsfMRI", 1)) for step in ("ours", "ours, compiled")]
    # 8 patches and 100 words: two samples in half a second.
    assert figures(tmp_path / "a")[0]["tokens/s"] == 2 * 108 / 0.5
    assert [line["MFU"] for line in figures(tmp_path / "a")] == [None] * 4


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("card", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H200", "float32", None),
    ],
)
def test_the_peak_is_that_of_a_known_card(
    monkeypatch: pytest.MonkeyPatch, card: str, dtype: str, peak: float | None
) -> None:
    from step_measure import find_peak

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert find_peak(argparse.Namespace(device="cuda", dtype=dtype)) == peak


@pytest.mark.usefixtures("tools")
def test_both_trainers_save_the_same_number_of_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_checkpoint

    saved: dict[str, list[str]] = {}

    measure = bench_checkpoint.time_saves

    def measure_and_list(kind: Any, options: Any, folder: Path) -> Any:
        figures = measure(kind, options, folder)
        saved[kind.__name__] = sorted(path.name for path in folder.glob("checkpoint-*"))
        return figures

    monkeypatch.setattr(bench_checkpoint, "time_saves", measure_and_list)
    arguments = ["--size", "tiny", "--rounds", "1", "--saves", "2", "--every", "2", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    bench_checkpoint.main()
    assert saved == {name: ["checkpoint-6", "checkpoint-8"] for name in ("OurTrainer", "TheirTrainer")}
    assert json.loads((tmp_path / "a.json").read_text())["seconds"].keys() == {"ours", "Hugging Face"}
    assert "ratio" in capsys.readouterr().out


@dataclass(frozen=True)
class Check:
    """A run of `gpu_check.sh run` with a stub for Python."""

    status: int
    stderr: str
    calls: list[str]
    parts: dict[str, str]


def check(folder: Path, *, device: str, failing: str = "nothing", seconds: int | None = 500) -> Check:
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase "$*" in *{failing}*) exit 7;; esac\n')
    python.chmod(0o700)
    ran = subprocess.run(
        ["bash", str(TOOLS / "gpu_check.sh"), "run", str(folder / "out")],
        env={
            **os.environ,
            "PYTHON": str(python),
            "DEVICE": device,
            "WHEELS": str(folder),
            **({} if seconds is None else {"TOTAL_SECONDS": str(seconds)}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    path = folder / "out" / "parts.jsonl"
    parts = {line["part"]: line["status"] for line in (figures(path) if path.exists() else [])}
    calls = [call for call in (folder / "calls").read_text().splitlines() if not call.startswith("- ")]
    return Check(ran.returncode, ran.stderr, calls, parts)


@pytest.mark.parametrize(("failing", "device"), [("bench_step", "cpu"), ("dummy_loss", "cuda"), ("nothing", "cpu")])
def test_gpu_check_runs_every_part_and_lists_failures(tmp_path: Path, failing: str, device: str) -> None:
    found = check(tmp_path, device=device, failing=failing)
    assert len(found.calls) == len(found.parts) == (5 if device == "cpu" else 8)
    assert found.status == (0 if failing == "nothing" else 1)
    assert ("failed: " in found.stderr) == (failing != "nothing")
    failed = {part for part, status in found.parts.items() if status == "7"}
    expected = {
        "bench_step": {"training steps", "other implementations"},
        "dummy_loss": {"dummy loss"},
        "nothing": set(),
    }
    assert failed == expected[failing]
    assert set(found.parts.values()) <= {"0", "7"}


def test_gpu_check_runs_the_tests_and_the_training_steps_first(tmp_path: Path) -> None:
    _, tests, steps, *_ = check(tmp_path, device="cuda").calls
    assert "-m gpu tests/test_engines_gpu.py" in tests
    assert "--device cuda --size 0.5b" in steps
    assert "--sections T1 rsfMRI mixed" in steps


def test_gpu_check_installs_the_wheels_without_network_if_a_module_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.whl").touch()
    found = check(tmp_path, device="cpu", failing="lazy_loader")
    assert "-m pip install --quiet --no-index --no-deps" in found.calls[0]
    assert found.calls[0].endswith("a.whl")
    assert found.status == 0


def test_gpu_check_keeps_the_results_of_an_earlier_one(tmp_path: Path) -> None:
    first = check(tmp_path, device="cpu")
    second = check(tmp_path, device="cpu")
    assert (first.status, second.status) == (0, 2)
    assert second.calls == first.calls


@pytest.mark.parametrize("arguments", [(), ("rum",), ("run", "--help"), ("prepare", "-h")])
def test_gpu_check_shows_its_usage_for_wrong_arguments(arguments: tuple[str, ...]) -> None:
    words = ["bash", str(TOOLS / "gpu_check.sh"), *arguments]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "TOTAL_SECONDS": "0"}
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "gpu_check.sh run [OUT]" in done.stderr


@pytest.mark.parametrize(("device", "shortest", "longest"), [("cpu", 1800, 3600), ("cuda", 60, 210)])
def test_gpu_check_limits_the_time_of_a_part_on_a_gpu_alone(
    device: str, shortest: int, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout = tmp_path / "bin" / "timeout"
    timeout.parent.mkdir()
    timeout.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/limits\nshift 2\nexec "$@"\n')
    timeout.chmod(0o700)
    monkeypatch.setenv("PATH", f"{timeout.parent}:{os.environ['PATH']}")
    found = check(tmp_path, device=device, seconds=None)
    limits = [int(limit) for limit in (tmp_path / "limits").read_text().split()]
    assert len(limits) == len(found.parts)
    assert (min(limits) >= shortest, max(limits) <= longest) == (True, True)


def test_gpu_check_ends_in_time(tmp_path: Path) -> None:
    found = check(tmp_path, device="cuda", seconds=0)
    assert found.status == 1
    assert set(found.parts.values()) == {"skipped"}
    assert found.calls == []
