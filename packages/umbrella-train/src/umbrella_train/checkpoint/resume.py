"""Which checkpoint a resumed run goes on from, the same on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from umbrella_train.checkpoint.integrity import checkpoint_problems, newest_good_checkpoint
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError

AUTO = "auto"


def find_checkpoint(config: RunConfig, resume: str) -> Path:
    """The checkpoint to go on from. The first rank alone looks, and reads every byte to verify; the others are told.

    Args:
        config: The run.
        resume: `auto` for the newest run of this name, a run's folder, or a checkpoint's folder.

    Raises:
        RunError: On every rank, where there is no intact checkpoint. With `auto`, it names that of an older run.
    """
    if not dist.is_initialized():
        return _look_for(config, resume)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_look_for(config, resume)]
        except (RunError, OSError) as error:
            found = [error]
    # Ranks that each looked for themselves could start from different checkpoints, on a file system that shows them
    # different moments.
    dist.broadcast_object_list(found)
    (answer,) = found
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Path)
    return answer


def _look_for(config: RunConfig, resume: str) -> Path:
    if resume == AUTO:
        newest, *older = _runs(config)
        try:
            return newest_good_checkpoint(newest)
        except RunError as error:
            raise RunError(f"{error}{_hint(older)}") from None
    folder = Path(resume)
    if not folder.is_dir():
        raise RunError(f"--resume {resume}: there is no such folder; name a checkpoint, a run's folder, or {AUTO}")
    if (folder / "config.yaml").is_file():
        return newest_good_checkpoint(folder)
    problems = checkpoint_problems(folder)
    if problems:
        raise RunError("cannot go on from this checkpoint:\n  " + "\n  ".join(problems))
    return folder


def _runs(config: RunConfig) -> list[Path]:
    """The folders of the runs of this name, the newest first."""
    runs = [path for path in config.output_dir.glob(f"{config.name}*") if (path / "config.yaml").is_file()]
    named = [path for path in runs if path.name == config.name or path.name.removeprefix(f"{config.name}-").isdigit()]
    if not named:
        raise RunError(f"{config.output_dir / config.name}: there is no such run to go on with")
    return sorted(named, key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)


def _hint(older: Sequence[Path]) -> str:
    """What an older run of the name could go on from: told and not taken, for its settings may be others."""
    for run in older:
        with contextlib.suppress(RunError):
            return f"\nan older run of this name has one; to go on from it: --resume {newest_good_checkpoint(run)}"
    return ""
