"""The checkpoint that a run resumes from, the same on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from umbrella_train.checkpoint.integrity import checkpoint_problems, newest_valid_checkpoint
from umbrella_train.config import RunConfig
from umbrella_train.distributed.ranks import on_first_rank
from umbrella_train.errors import RunError

AUTO = "auto"


def find_checkpoint(config: RunConfig, resume: str) -> Path:
    """The checkpoint to resume from, found and verified by the first rank and broadcast to the others.

    Args:
        config: The run.
        resume: `auto` for the newest run of this name, a run's folder, or a checkpoint's folder.

    Raises:
        RunError: On every rank, if there is no valid checkpoint. With `auto`, it names that of an older run.
    """
    # If each rank searched, they could find different checkpoints on a network file system.
    return on_first_rank(lambda: _find(config, resume))


def _find(config: RunConfig, resume: str) -> Path:
    if resume == AUTO:
        newest, *older = _runs(config)
        try:
            return newest_valid_checkpoint(newest)
        except RunError as error:
            raise RunError(f"{error}{_hint(older)}") from None
    folder = Path(resume)
    if not folder.is_dir():
        raise RunError(f"--resume {resume}: there is no such folder; give a checkpoint, a run's folder, or {AUTO}")
    if (folder / "config.yaml").is_file():
        return newest_valid_checkpoint(folder)
    problems = checkpoint_problems(folder)
    if problems:
        raise RunError("cannot resume from this checkpoint:\n  " + "\n  ".join(problems))
    return folder


def _runs(config: RunConfig) -> list[Path]:
    """The folders of the runs of this name, the newest first."""
    runs = [path for path in config.output_dir.glob(f"{config.name}*") if (path / "config.yaml").is_file()]
    named = [path for path in runs if path.name == config.name or path.name.removeprefix(f"{config.name}-").isdigit()]
    if not named:
        raise RunError(f"{config.output_dir / config.name}: there is no such run to resume")
    return sorted(named, key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)


def _hint(older: Sequence[Path]) -> str:
    """A message about the checkpoint of an older run of this name; it is not used, since its settings may differ."""
    for run in older:
        with contextlib.suppress(RunError):
            return f"\nan older run of this name has one; to resume from it: --resume {newest_valid_checkpoint(run)}"
    return ""
