"""Integrity manifest of a checkpoint: a hash of every file, written last and verified before a resume."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from itertools import count
from pathlib import Path

from umbrella_data.files.atomic import write_atomically
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

INTEGRITY_NAME = "integrity.json"
TRAINER_STATE_NAME = "trainer_state.json"
PICKLES = frozenset({".bin", ".pkl", ".pt", ".pth"})
"""Endings of files that Hugging Face's Trainer or torch unpickle."""


def write_integrity_manifest(folder: Path) -> None:
    """Writes the hashes of all files of a finished checkpoint, atomically; a checkpoint without them is not valid.

    Before, all files are flushed to the disk: after a power failure, a checkpoint with a manifest is complete.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INTEGRITY_NAME)
    for path in [*files, *{path.parent for path in files}]:
        _flush(path)
    hashes = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_atomically(folder / INTEGRITY_NAME, [json.dumps(hashes, indent=1).encode()], sync=True)
    _flush(folder)
    _flush(folder.parent)


def checkpoint_problems(folder: Path) -> list[str]:
    """Why a checkpoint cannot be resumed: no integrity manifest, missing or changed files, added weights or pickles.

    Other added files are ignored, since nothing reads them.

    Returns:
        One sentence per problem; empty for a valid checkpoint.
    """
    if not is_finished(folder):
        return [f"{folder}: has no {INTEGRITY_NAME}: saving was not finished"]
    try:
        manifest = json.loads((folder / INTEGRITY_NAME).read_bytes())
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{folder / INTEGRITY_NAME}: cannot be read ({error}): the checkpoint is damaged"]
    problems = []
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.stat().st_size != size:
            problems.append(f"{path}: has {path.stat().st_size} bytes instead of {size}")
        elif _sha256(path) != digest:
            problems.append(f"{path}: its content changed after it was written")
    # All safetensors are loaded, independently of their names; of pickles, Hugging Face's Trainer loads some.
    loaded = {path.name for path in folder.iterdir() if path.suffix in PICKLES | {".safetensors"}}
    added = sorted(loaded - listed.keys())
    problems += [f"{folder / name}: was not written with this checkpoint" for name in added]
    return problems or _step_problems(folder)


def _step_problems(folder: Path) -> list[str]:
    """Whether the state is that of another step than the folder's name says."""
    path = folder / TRAINER_STATE_NAME
    if _step_in(folder) < 0 or not path.is_file():
        return []
    step = json.loads(path.read_bytes()).get("global_step")
    return [] if step == _step_in(folder) else [f"{path}: is of step {step}, unlike the name of its folder"]


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """The folders `checkpoint-N` of a run by N, the newest first; also unfinished ones."""
    steps = {_step_in(path): path for path in run_folder.glob("checkpoint-*")}
    return {step: path for step, path in sorted(steps.items(), reverse=True) if step >= 0}


def _step_in(folder: Path) -> int:
    """The N of a folder `checkpoint-N`, else -1."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != folder.name else -1


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint has an integrity manifest: it was written to its end, though it may be damaged by now."""
    return (checkpoint / INTEGRITY_NAME).is_file()


def newest_valid_checkpoint(run_folder: Path) -> Path:
    """The newest valid checkpoint of a run; damaged ones are skipped with a warning.

    Raises:
        RunError: No checkpoint is valid; the message lists the problems of each.
    """
    problems: list[str] = []
    for folder in checkpoint_folders(run_folder).values():
        found = checkpoint_problems(folder)
        if not found:
            return folder
        logger.warning("skipping a damaged checkpoint: %s", "; ".join(found))
        problems += found
    raise RunError(f"{run_folder}: has no checkpoint to resume from" + "".join(f"\n  {line}" for line in problems))


def remove_old_checkpoints(run_folder: Path, *, keep: int | None, best: Path | None = None) -> None:
    """Removes what a new checkpoint makes unnecessary: unfinished checkpoints, and the oldest finished ones.

    Call it when no checkpoint is being written. Finished means with an integrity manifest: hashing every checkpoint at
    each save would read all of them.

    Args:
        run_folder: The run's folder.
        keep: Number of finished checkpoints to keep, the newest ones; None for all.
        best: A checkpoint that is kept in any case, as one of these.
    """
    folders = checkpoint_folders(run_folder).values()
    finished = [folder for folder in folders if is_finished(folder)]
    kept = sorted(finished, key=lambda folder: folder != best)[:keep]  # sorted is stable: the newest first
    for folder in folders:
        if folder not in kept and folder not in finished[:1]:
            # A folder that is half removed must not count as finished.
            (folder / INTEGRITY_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def set_newer_aside(run_folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints after the step that a run continues from to `set-aside-K/checkpoint-N`.

    Returns:
        The new paths; empty if there is no newer checkpoint.
    """
    newer = [folder for number, folder in checkpoint_folders(run_folder).items() if number > step]
    if not newer:
        return []
    aside = next(path for number in count(1) if not (path := run_folder / f"set-aside-{number}").exists())
    aside.mkdir()
    return [folder.rename(aside / folder.name) for folder in newer]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
