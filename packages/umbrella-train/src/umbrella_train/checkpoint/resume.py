"""Where a run starts: in a new folder, or from a checkpoint of an existing one, which is locked first."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella_train.checkpoint.changes import Changes, describe_changes, read_record
from umbrella_train.checkpoint.integrity import (
    checkpoint_folders,
    checkpoint_problems,
    is_finished,
    newest_valid_checkpoint,
    set_newer_aside,
)
from umbrella_train.config import RunConfig, dump_config
from umbrella_train.distributed.ranks import on_first_rank
from umbrella_train.errors import RunError
from umbrella_train.run_folder import RunFolder, fold_folders
from umbrella_train.run_lock import RunLock

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: The existing folder to train into; None: a new one.
        checkpoint: The checkpoint to resume from; None: step 0.
        is_finished: Whether the run was trained, evaluated and reported with this configuration.
    """

    folder: RunFolder | None = None
    checkpoint: Path | None = None
    is_finished: bool = False

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        if self.checkpoint is None:
            return 0
        return int(json.loads((self.checkpoint / "trainer_state.json").read_bytes())["global_step"])

    @property
    def record(self) -> dict[str, Any]:
        """What the checkpoint recorded of its run."""
        return {} if self.checkpoint is None else read_record(self.checkpoint)


def find_start(config: RunConfig, resume: str | None, *, locks: ExitStack) -> Start:
    """Finds and locks the run to resume, and verifies its checkpoint; the first rank does, and tells the others.

    Args:
        config: The run.
        resume: None for a new run; `auto` for the newest run of this name, or a new one; the folder of a run or of a
            checkpoint.
        locks: Holds the lock of the folder, on the first rank.

    Raises:
        RunError: On every rank: there is no valid checkpoint, or another job runs in the folder. With `auto`, a run
            without a finished checkpoint starts again; one whose checkpoints are damaged is an error.
    """
    if resume is None:
        return Start()
    # If each rank searched, they could find different checkpoints on a network file system.
    return on_first_rank(lambda: _find(config, resume, locks))


def _find(config: RunConfig, resume: str, locks: ExitStack) -> Start:
    if resume != AUTO:
        return _start_from(Path(resume), locks)
    runs = _runs(config)
    if not runs:
        logger.info("%s: there is no such run to resume: a new one starts", config.output_dir / config.name)
        return Start()
    folder = RunFolder.open(runs[0])
    locks.enter_context(RunLock(folder.path))
    if folder.finished.exists() and folder.has_config(dump_config(config)):
        return Start(folder, is_finished=True)
    if any(is_finished(checkpoint) for checkpoint in checkpoint_folders(folder.path).values()):
        return Start(folder, newest_valid_checkpoint(folder.path))
    logger.info("%s: has no checkpoint yet: it starts again%s", folder.path, _hint(runs[1:]))
    return Start(folder)


def open_folder(config: RunConfig, start: Start, *, changes: Changes, is_only: bool, locks: ExitStack) -> RunFolder:
    """Creates the run's folder, or prepares an existing one; call it on one rank, when nothing else can be rejected.

    In an existing folder, checkpoints after the start are set aside, and those that were not written to their end are
    removed.

    Args:
        config: The run.
        start: From `find_start`.
        changes: Changed settings that were allowed, for config.yaml and the report.
        is_only: Whether a run of this name that another job created since is an error.
        locks: Holds the lock of a new folder.
    """
    if start.folder is None:
        text = dump_config(config)
        return RunFolder.create(config.output_dir, name=config.name, config_text=text, locks=locks, is_only=is_only)
    folder = start.folder
    folder.begin()
    for checkpoint in checkpoint_folders(folder.path).values():
        if not is_finished(checkpoint):
            shutil.rmtree(checkpoint)
    for aside in set_newer_aside(folder.path, start.step):
        logger.warning("%s: is newer than the start of this run and was moved to %s", aside.name, aside.parent)
    folder.replace_config(dump_config(config), step=start.step)
    if changes:
        folder.add_changes(describe_changes(changes), step=start.step)
    return folder


def _start_from(path: Path, locks: ExitStack) -> Start:
    if not path.is_dir():
        raise RunError(f"--resume {path}: there is no such folder; give a checkpoint, a run's folder, or {AUTO}")
    is_run = (path / "config.yaml").is_file()
    folder = RunFolder.open(path if is_run else path.absolute().parent)
    locks.enter_context(RunLock(folder.path))
    if is_run:
        return Start(folder, newest_valid_checkpoint(path))
    problems = checkpoint_problems(path)
    if problems:
        raise RunError("cannot resume from this checkpoint:\n  " + "\n  ".join(problems))
    return Start(folder, path)


def _runs(config: RunConfig) -> list[Path]:
    """The folders of the runs of this name, the newest first."""
    runs = [path for path in config.output_dir.glob(f"{config.name}*") if (path / "config.yaml").is_file()]
    named = [path for path in runs if path.name == config.name or path.name.removeprefix(f"{config.name}-").isdigit()]
    named = [path for path in named if not fold_folders(path)]  # of a cross-validation
    return sorted(named, key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)


def _hint(older: Sequence[Path]) -> str:
    """A message about the checkpoint of an older run of this name; it is not used, since its settings may differ."""
    for run in older:
        with contextlib.suppress(RunError):
            return f"; an older run of this name has one: --resume {newest_valid_checkpoint(run)}"
    return ""
