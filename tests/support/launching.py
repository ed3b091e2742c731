"""Starts cases on several ranks and reads their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import warm
from engines import Case, run_cases
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).parent / "engines.py"


def torchrun(world_size: int) -> list[str]:
    """The command that starts a number of ranks on this machine."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]


def launch(cases: Sequence[Case], folder: Path, *, launcher: Sequence[str], timeout: float = 280) -> str:
    """Runs cases on several ranks in one process group; all of them are killed after the timeout.

    Args:
        cases: What to train, one after the other.
        folder: Folder of the results and the output of the ranks.
        launcher: Python module that starts the ranks, with its arguments.
        timeout: In seconds.

    Returns:
        The stderr of the ranks.
    """
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", *launcher]
    with (
        (folder / "stderr").open("w") as errors,
        subprocess.Popen(
            [*command, str(SCRIPT), str(folder / "cases.json"), str(folder)],
            stdout=errors,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process,
    ):
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            # Each rank has its own session: it is killed by its process id.
            ranks = psutil.Process(process.pid).children(recursive=True)
            for each in [*ranks, process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
    return (folder / "stderr").read_text()


def launch_warm(cases: Sequence[Case], folder: Path, *, num_ranks: int, timeout: float = 280) -> str:
    """As `launch`, with ranks that are forked from a warm parent instead of started by a launcher."""
    folder.mkdir(exist_ok=True)
    ranks = warm.start_ranks(run_cases, cases, folder, outputs=[folder / "stderr"] * num_ranks)
    warm.end_together(ranks, seconds=timeout)
    return (folder / "stderr").read_text()


def results_of(case: Case, folder: Path, *, world_size: int) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """The log and the weights of every rank; fails if one has none or ended with an error."""
    logs, weights = [], []
    for rank in range(world_size):
        path = folder / f"{case.name}-{rank}.json"
        assert path.is_file(), f"rank {rank} did not get to {case.name}\n{(folder / 'stderr').read_text()[-3000:]}"
        logs.append(json.loads(path.read_text()))
        assert logs[-1]["error"] is None, logs[-1]["error"]
        weights.append(load_file(folder / f"{case.name}-{rank}.safetensors"))
    return logs, weights
