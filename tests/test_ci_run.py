"""`.ci/run` fails if any of its steps fails, also of those in the background."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# In the order of their output.
STEPS = [
    "uv sync",
    "uv run ruff check",
    "uv run ruff format",
    "uv run lint-imports",
    "uv run mypy",
    "vendor.github-workflows",
    "vendor.github-issue-forms",
    "uv run python tools/check_api.py",
    "bash tools/build_docs.sh",
    "bash tools/gpu_check.sh",
    "tools/pretrained_smollm2.py",
    "--package umbrella-data pytest",
    "--package umbrella-model pytest",
    "--package umbrella-train pytest",
    "bash tools/check_wheels.sh",
    "uv run umbrella-train",
    "uv run python tools/check_demo.py",
    "bash tools/check_lowest.sh",
    "uv run pytest --durations",
    "uv run pytest -n 0 -m pretrained",
    "uv run --with deepspeed",
    "uv run pytest -n 0 -m examples",
]
# Stands for uv and bash: a step of the given words fails.
STUB = """#!/bin/bash
[ -z "${PYTHONDONTWRITEBYTECODE-}" ] || exit 4
case "${0##*/} $*" in *"$FAILING"*) echo "output of the step that fails"; exit 3 ;; esac
case "$*" in *"$HANGING"*) echo $$ >"$PIDS"; sleep 60; echo survived ;; esac
"""


# What the script itself calls.
TOOLS = ("cat", "dirname", "env", "mktemp", "rm", "sed", "tail")


def run(
    folder: Path, *, failing: str = "no step", hanging: str = "no step", has_browser: bool = True
) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    (folder / "bin").mkdir()
    for name in ("uv", "bash"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    if has_browser:
        (folder / "bin/chromium").symlink_to("uv")  # the tests install nothing
    else:
        (folder / "bin/apt-get").symlink_to("uv")
        (folder / "bin/id").write_text("#!/bin/bash\necho 0\n")
        (folder / "bin/id").chmod(0o755)
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
        path = str(folder / "bin")
    pids = folder / "pids"
    variables = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": path,
        "FAILING": failing,
        "HANGING": hanging,
        "PIDS": str(pids),
        "TMPDIR": str(folder),
    }
    return subprocess.run(
        ["/bin/bash", str(folder / ".ci/run")],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )


def test_all_steps_run_once_and_their_output_is_in_order(tmp_path):
    done = run(tmp_path)
    headers = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert done.returncode == 0, done.stdout
    assert len(headers) == len(STEPS)
    assert [step for step, header in zip(STEPS, headers, strict=True) if step not in header] == []
    assert "all checks passed" in done.stdout


def test_browser_is_installed_where_there_is_none(tmp_path):
    done = run(tmp_path, has_browser=False)
    headers = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert done.returncode == 0, done.stdout
    assert "apt-get install" in headers[1]
    assert "chromium" in headers[1]
    assert len(headers) == len(STEPS) + 2


@pytest.mark.parametrize("step", STEPS)
def test_step_that_fails_ends_the_run(step, tmp_path):
    done = run(tmp_path, failing=step)
    assert done.returncode not in (0, None)
    assert "all checks passed" not in done.stdout
    if step != "uv run umbrella-train":  # its own output is kept in a file
        assert "output of the step that fails" in done.stdout


def test_steps_in_the_background_end_with_the_run(tmp_path):
    done = run(tmp_path, failing="uv run mypy", hanging="pretrained_smollm2")
    assert done.returncode == 3
    pid = int((tmp_path / "pids").read_text())
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10)
    # What they have printed is shown.
    assert "tools/pretrained_smollm2.py" in done.stdout
