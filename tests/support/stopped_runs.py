"""Runs of the command in processes forked from a warm parent, held at a moment of the run to receive a signal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import warm
import yaml
from tiny_model import MODEL

from umbrella_data.synthetic.cohort import DemoCohort

MOMENTS = ("before", "step", "save", "evaluation")
NUM_STEPS, STOPPED_STEP = 5, 2


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
    port = warm.free_port()
    ranks: list[Any] = []
    for rank in range(num_ranks):
        leader = ranks[0].pid if ranks else 0
        environment = warm.environment_of(rank, num_ranks=num_ranks, port=port)
        output = folder / f"output-{rank}"
        ranks.append(
            warm.start(_run_rank, list(words), folder, rank, leader, moment, output=output, environment=environment)
        )
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


def _run_rank(words: list[str], folder: Path, rank: int, leader: int, moment: str | None) -> None:
    os.setpgid(0, leader)
    (folder / f"started-{rank}").touch()

    from umbrella_train.cli import train_command
    from umbrella_train.run import training
    from umbrella_train.trainer.checkpoints import Checkpoints

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
