"""Integrity manifest of a checkpoint: a hash of every file, written last and verified before a resume."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from umbrella_data.files.atomic import write_atomically
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

INTEGRITY_NAME = "integrity.json"


def write_integrity_manifest(folder: Path) -> None:
    """Writes the hashes of all files of a finished checkpoint, atomically; a checkpoint without them is not valid."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INTEGRITY_NAME)
    hashes = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_atomically(folder / INTEGRITY_NAME, [json.dumps(hashes, indent=1).encode()], sync=True)


def checkpoint_problems(folder: Path) -> list[str]:
    """Why a checkpoint cannot be resumed: no integrity manifest, missing or changed files, or added weights.

    Other added files are ignored, since nothing reads them.

    Returns:
        One sentence per problem; empty for a valid checkpoint.
    """
    if not (folder / INTEGRITY_NAME).is_file():
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
    # All of these are loaded, independently of their names.
    added = sorted({path.name for path in folder.glob("*.safetensors")} - listed.keys())
    return problems + [f"{folder / name}: was not written with this checkpoint" for name in added]


def newest_valid_checkpoint(run_folder: Path) -> Path:
    """The newest valid checkpoint of a run; damaged ones are skipped with a warning.

    Raises:
        RunError: No checkpoint is valid; the message lists the problems of each.
    """
    folders = [path for path in run_folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    folders.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    problems: list[str] = []
    for folder in folders:
        found = checkpoint_problems(folder)
        if not found:
            return folder
        logger.warning("skipping a damaged checkpoint: %s", "; ".join(found))
        problems += found
    raise RunError(f"{run_folder}: has no checkpoint to resume from" + "".join(f"\n  {line}" for line in problems))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
