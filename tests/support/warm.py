"""Processes forked from a warm parent, which has imported what training imports: a start takes no seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# For models this small threads cost more than they save; libraries read it when the warm parent imports them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "umbrella_train.run.training",
        "umbrella_train.cli",
        "umbrella_train.distributed.fsdp2",
        "transformers.trainer",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.siglip.modeling_siglip",
    ]
)


def start(
    function: Callable[..., None],
    *arguments: Any,
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Starts a function of an importable module in a process with this environment.

    Args:
        function: What the process does.
        arguments: Its arguments, picklable.
        output: The file that stdout is appended to.
        errors: The file that stderr is appended to; None for the same.
        environment: More variables.
    """
    whole = {**os.environ, **(environment or {})}
    process = _context.Process(target=_run, args=(function, arguments, output, errors or output, whole))
    process.start()
    return process


def start_ranks(function: Callable[..., None], *arguments: Any, outputs: Sequence[Path]) -> list[Any]:
    """Starts a function in one process per output, with the environment of ranks that torchrun starts."""
    port = free_port()
    return [
        start(
            function,
            *arguments,
            output=output,
            environment=environment_of(rank, num_ranks=len(outputs), port=port),
        )
        for rank, output in enumerate(outputs)
    ]


def output_of_ranks(code: str, words: Sequence[str] = (), *, folder: Path) -> list[str]:
    """What each of two ranks prints that do what `python -c CODE WORDS` does; fails if one of them does."""
    outputs = [folder / f"output-{rank}" for rank in range(2)]
    codes = end_together(start_ranks(run_code, code, words, outputs=outputs), seconds=120)
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], texts
    return texts


def environment_of(rank: int, *, num_ranks: int, port: int) -> dict[str, str]:
    """The variables of a rank; none if there is only one."""
    if num_ranks == 1:
        return {}
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_together(processes: Sequence[Any], *, seconds: float) -> list[int]:
    """Exit codes of all processes, which are killed when one fails or the time is over."""
    for _ in processes:
        if wait_for_end := [each.sentinel for each in processes if each.exitcode is None]:
            wait(wait_for_end, seconds)
        if any(each.exitcode for each in processes):
            break
    for each in processes:
        each.kill()
        each.join()
    return [each.exitcode for each in processes]


def run_code(code: str, words: Sequence[str]) -> None:
    """What `python -c CODE WORDS` does."""
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def _run(
    function: Callable[..., None], arguments: Sequence[Any], output: Path, errors: Path, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    gc.freeze()  # as in conftest.py
    # For data workers; otherwise they get a warm parent of their own.
    multiprocessing.set_start_method("fork", force=True)

    import torch

    torch.set_num_threads(1)
    function(*arguments)
