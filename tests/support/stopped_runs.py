"""Runs of the command in processes forked from a warm parent, held at a moment of the run to receive a signal."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tiny_model import MODEL

from umbrella_data.synthetic.cohort import DemoCohort

MOMENTS = ("before", "step", "save", "evaluation")
NUM_STEPS, STOPPED_STEP = 5, 2

# For models this small threads cost more than they save; libraries read it when the warm parent imports them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["umbrella_train.run.training", "umbrella_train.cli", "transformers.trainer"])


def write_config(folder: Path, cohort: DemoCohort, *, num_workers: int = 0, **trainer: Any) -> Path:
    """A config of five steps with dropout, an evaluation after each second one, and no checkpoint before the last."""
    content = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": MODEL,
        "data": {
            "train": [{"manifest": str(cohort.train_manifest)}],
            "evaluation": [{"manifest": str(cohort.test_manifest)}],
            "cache_dir": str(cohort.train_manifest.parent / "cache"),
        },
        "trainer": {
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_steps": 100,
            "use_cpu": True,
            "dataloader_num_workers": num_workers,
            **trainer,
        },
        "report": {"enabled": False, "pictures": False, "controls": False, "max_new_tokens": 2},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start_ranks(words: Sequence[str], folder: Path, *, num_ranks: int = 1, moment: str | None = None) -> list[Any]:
    """Starts `umbrella-train WORDS` in one process group of its own.

    Args:
        words: The command's arguments.
        folder: Where the ranks write their output, and wait for each other.
        num_ranks: Number of processes.
        moment: Where every rank touches `ready-RANK` and waits until there is a file `sent`; None for nowhere.

    Returns:
        The processes, the leader of the group first.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[Any] = []
    for rank in range(num_ranks):
        leader = ranks[0].pid if ranks else 0
        arguments = (list(words), folder, rank, num_ranks, port, leader, moment)
        ranks.append(_context.Process(target=_run_rank, args=arguments))
        ranks[-1].start()
        wait_for(folder / f"started-{rank}", alive=ranks)
    return ranks


def wait_for(path: Path, *, alive: Sequence[Any] = (), seconds: float = 120) -> None:
    """Waits for a file; fails if all processes have ended before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name}: {output_of(path.parent)}"
        assert not alive or any(each.is_alive() for each in alive), output_of(path.parent)
        time.sleep(0.01)


def exit_codes(ranks: Sequence[Any], *, seconds: float = 60) -> list[int | None]:
    """Exit codes of all ranks; None for one that hangs, which is killed."""
    codes = []
    for rank in ranks:
        rank.join(seconds)
        codes.append(rank.exitcode)
        if rank.exitcode is None:
            rank.kill()
    return codes


def output_of(folder: Path) -> str:
    """What the ranks have printed."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("output-*")))


def _run_rank(
    words: list[str], folder: Path, rank: int, num_ranks: int, port: int, leader: int, moment: str | None
) -> None:
    os.setpgid(0, leader)
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (folder / f"started-{rank}").touch()
    multiprocessing.set_start_method(
        "fork", force=True
    )  # for data workers; otherwise they get a warm parent of their own

    import torch

    from umbrella_train.cli import train_command
    from umbrella_train.run import training
    from umbrella_train.trainer.checkpoints import Checkpoints

    torch.set_num_threads(1)

    def hold() -> None:
        (folder / f"ready-{rank}").touch()
        wait_for(folder / "sent")

    if moment == "before":
        training.build_components = _after(hold, training.build_components)
    elif moment is not None:
        kind: Any = Checkpoints if moment in ("in a save", "after a save") else training.UmbrellaTrainer
        method = {
            "step": "compute_loss",
            "save": "_save_checkpoint",
            "evaluation": "prediction_step",
            "in a save": "_save_training_state",  # the weights are written
            "after a save": "_finish",  # in the background
        }[moment]
        original = getattr(kind, method)

        def held(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = self._trainer.state if kind is Checkpoints else self.state
            if state.global_step >= STOPPED_STEP and not (folder / f"ready-{rank}").exists():
                hold()
            return original(self, *args, **kwargs)

        setattr(kind, method, held)
    train_command(words)


def _after(before: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return held
