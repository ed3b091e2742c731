"""The run folder: where each file of a run is, and how lines are added to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from umbrella_data.files.atomic import write_atomically
from umbrella_data.privacy import name_hasher, pseudonyms, read_or_create_salt
from umbrella_train.errors import RunError
from umbrella_train.run_lock import RunLock

logger = logging.getLogger(__name__)


class _File:
    """The path of a file, or folder, of a run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, _: type[RunFolder]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/` and the paths in it.

    Attributes:
        path: The folder.
        on_metrics: Receives every line that is added to metrics.jsonl.
    """

    path: Path
    on_metrics: Callable[[Mapping[str, Any]], None] | None = field(default=None, compare=False)

    config = _File("config.yaml")
    """The resolved configuration."""
    metrics = _File("metrics.jsonl")
    """Training and evaluation metrics, one JSON object per line."""
    predictions = _File("predictions.jsonl")
    """Answers of the newest evaluation, one JSON object per line."""
    answers = _File("answers.json")
    """The possible answers of each task, in the words of the training data."""
    baselines = _File("baselines.jsonl")
    """Answers of the baselines, see `umbrella-eval --baselines`, one JSON object per line."""
    model = _File("model")
    """Weights, config and tokenizer at the end of the run."""
    report = _File("report.html")
    """The report."""
    pictures = _File("pictures")
    """Pictures of what the model sees, one PNG per modality, and with `report.viewer` the HTML of the scan."""
    salt = _File("salt")
    """The salt of the subjects' hashes, readable by its owner only; like the table of names, it is not to be shared."""
    changes = _File("changes.jsonl")
    """Settings that were changed when the run was resumed, one JSON object per resume."""
    finished = _File("FINISHED")
    """Exists once the run is trained, evaluated and reported."""
    requeue = _File("REQUEUE")
    """Exists while the run is interrupted by its scheduler, for scripts that start it again."""

    @classmethod
    def create(
        cls, output_dir: Path, *, name: str, config_text: str, locks: ExitStack | None = None, is_only: bool = False
    ) -> RunFolder:
        """Create a new folder; a name in use becomes NAME-2, NAME-3, ... Call it on one rank only.

        Without `locks`, which hold its lock, the folder is not locked.

        Raises:
            RunError: There is another run of this name, with `is_only`.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        # The folder gets its name when it is complete and locked: runs that start together get different folders.
        staged = cls(output_dir / f".{name}.{secrets.token_hex(8)}")
        try:
            staged.pictures.mkdir(parents=True)
            staged.config.write_text(config_text, encoding="utf-8")
            read_or_create_salt(staged.salt)
            lock = None if locks is None else locks.enter_context(RunLock(staged.path))
        except OSError:  # as of a full disk
            shutil.rmtree(staged.path, ignore_errors=True)
            raise
        for number in count(1):
            path = output_dir / (name if number == 1 else f"{name}-{number}")
            if is_only and (path / "config.yaml").exists():
                if lock is not None:
                    lock.release()
                shutil.rmtree(staged.path)
                raise RunError(f"{path}: another job has just created this run; to resume it later: --resume auto")
            with contextlib.suppress(OSError):  # the folder exists and is not empty, or is a file
                staged.path.rename(path)
                break
            if not path.exists():
                raise RunError(f"{path}: cannot be created")
        if lock is not None:
            lock.move_to(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a run.

        Raises:
            RunError: If it is not a run's folder.
        """
        if not (path / "config.yaml").is_file():
            raise RunError(no_run_message(path, otherwise="not a run's folder (it has no config.yaml)"))
        return cls(path)

    def begin(self) -> None:
        """Remove the marks of an earlier job."""
        self.finished.unlink(missing_ok=True)
        self.requeue.unlink(missing_ok=True)

    def has_config(self, config_text: str) -> bool:
        """Whether config.yaml holds this configuration; comments do not count."""
        return _without_comments(self.config.read_text(encoding="utf-8")) == _without_comments(config_text)

    def replace_config(self, config_text: str, *, step: int) -> None:
        """Write the configuration of a resumed run; one that differs is kept as config-until-checkpoint-N.yaml."""
        if self.has_config(config_text):
            return
        kept = next(path for path in self._numbered(f"config-until-checkpoint-{step}", ".yaml") if not path.exists())
        kept.write_bytes(self.config.read_bytes())
        before = self.config.read_text(encoding="utf-8").splitlines(keepends=True)
        comments = [line for line in before if line.startswith("#")]
        write_atomically(self.config, ["".join([*comments, config_text]).encode()])

    def add_changes(self, lines: Iterable[str], *, step: int) -> None:
        """List settings that a resumed run changed: in config.yaml as comments, and in changes.jsonl for the report."""
        lines = list(lines)
        append_line(self.changes, {"step": step, "changes": lines})
        comments = "".join(f"# Changed after step {step}: {line}\n" for line in lines)
        write_atomically(self.config, [comments.encode(), self.config.read_bytes()])

    def subject_hash(self, *, is_kept: bool = True) -> Callable[[str], str]:
        """The function that hashes the name of a subject for this run.

        If hashes are written to files (`is_kept`), the run's table of names gets them.
        """
        return pseudonyms(self.path) if is_kept else name_hasher(read_or_create_salt(self.salt))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl. Numbers that are not finite are written as null."""
        append_line(self.metrics, row)
        if self.on_metrics is not None:
            self.on_metrics(row)

    def last_step(self) -> int:
        """The step of the newest line of metrics.jsonl, 0 if there is none."""
        rows, _ = read_lines(self.metrics)
        return max((int(row.get("step", 0)) for row in rows), default=0)

    def mark_metrics(self) -> dict[str, Any]:
        """Length and hash of metrics.jsonl, for a checkpoint."""
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def cut_metrics(self, step: int, mark: Mapping[str, Any] | None = None) -> None:
        """Cut metrics.jsonl to what it was at a checkpoint: a resumed run writes the rest again.

        A file whose beginning has changed is set aside as metrics-damaged.jsonl, and its valid lines up to the step are
        kept, with a warning.

        Args:
            step: The checkpoint's step.
            mark: What `mark_metrics` returned at the checkpoint; None for a new run or an older checkpoint.
        """
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        before = content if mark is None else content[: mark["bytes"]]
        if mark is not None and hashlib.sha256(before).hexdigest() == mark["sha256"]:
            if len(before) < len(content):
                os.truncate(self.metrics, len(before))
            return
        rows, num_broken = read_lines(self.metrics)
        kept = [row for row in rows if row.get("step", 0) <= step]
        if mark is not None or num_broken:
            logger.warning(
                "%s: differs from what it was at step %d: %d lines are kept, %d are unreadable, others may be missing",
                self.metrics,
                step,
                len(kept),
                num_broken,
            )
        if content:
            if mark is not None or num_broken:
                aside = next(path for path in self._numbered("metrics-damaged", ".jsonl") if not path.exists())
                aside.write_bytes(content)
            write_atomically(self.metrics, (json_line(row).encode() for row in kept))

    def _numbered(self, stem: str, end: str) -> Iterator[Path]:
        return (self.path / (f"{stem}{end}" if number == 1 else f"{stem}-{number}{end}") for number in count(1))

    def write_predictions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace predictions.jsonl atomically."""
        write_lines(self.predictions, rows)


def fold_folders(path: Path) -> list[Path]:
    """The runs `fold-1`, `fold-2`, ... in the folder of a cross-validation, in this order; empty for other folders."""
    found = {path.name.removeprefix("fold-"): path for path in path.glob("fold-*") if (path / "config.yaml").is_file()}
    return [found[number] for number in sorted(filter(str.isdecimal, found), key=int)]


def no_run_message(path: Path, *, otherwise: str) -> str:
    """Why a path is no run: there is no such folder, it has runs in it, or otherwise what is given."""
    if not path.exists():
        return f"{path}: there is no such folder; give the folder of a run, as in runs/NAME"
    return runs_hint(path) or f"{path}: {otherwise}"


def runs_hint(path: Path) -> str:
    """A message for a folder that is no run but has some in it, such as that of a run in stages; empty for others."""
    # The newest last: a stage is created when the one before is finished. Names with a dot are runs that begin.
    runs = [config for config in path.glob("*/config.yaml") if not config.parent.name.startswith(".")]
    runs.sort(key=lambda config: config.stat().st_mtime)
    names = ", ".join(config.parent.name for config in runs)
    return f"{path}: has the runs {names}; name one, as in {runs[-1].parent}" if runs else ""


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def check_output(path: Path, *, inputs: Iterable[Path]) -> None:
    """Rejects a file that could not be written at the end of a long command; creates its folder.

    Raises:
        RunError: The path is a folder, or one of the inputs, which would be replaced, or its folder cannot be created
            or written to.
    """
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a file, such as {path / 'answers.jsonl'}")
    if any(path.resolve() == each.resolve() for each in inputs):
        raise RunError(f"{path}: is the manifest that is read, and would be replaced; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path}: its folder cannot be created: {error}; name another file") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RunError(f"{path}: its folder is not writable; name another file")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; the file appears, or is replaced, once it is complete."""
    write_atomically(path, (json_line(row).encode() for row in rows))


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, in one write; an incomplete last line is ended first."""
    line = json_line(row)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of JSON lines, and the number of unreadable ones: a crash may have left an incomplete line.

    A row whose `step` is no whole number is damaged too. Without the file there are no rows.
    """
    if not path.exists():
        return [], 0
    rows, num_broken = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or truncated inside a UTF-8 character
            row = None
        if isinstance(row, dict) and isinstance(row.get("step", 0), int):
            rows.append(row)
        else:
            num_broken += bool(line.strip())
    return rows, num_broken


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON. Numbers that are not finite are null."""
    # NaN is not JSON: other readers would reject the whole file.
    finite = {key: value if _is_writable(value) else None for key, value in row.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _is_writable(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
