"""Reading the scans of one command in several jobs: each job reads a shard, and a merge combines what they found.

    --shard 1/3   reads a third of the subjects  -> FOLDER/1-of-3.jsonl, one line for each scan
    --shard 2/3   ...
    --merge       reads no scan, but the three files; from there on, it is the same code as without shards

Everything but reading scans, such as splits, options of a choice and duplicates, is decided by the merge.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.files.parallel import map_unordered
from umbrella_data.scan.gradient_table import Shell
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.verify import VerifiedScan


class _HasModality(Protocol):
    @property
    def modality(self) -> str: ...


Item = TypeVar("Item", bound=_HasModality)
Outcome = VerifiedScan | ScanError

_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """A part of the subjects.

    Attributes:
        number: Which one, from 1 to `count`.
        count: Number of all shards; it may exceed the number of subjects, some shards are then empty.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def subjects(self, all_subjects: Iterable[str]) -> set[str]:
        """The subjects of this shard.

        Args:
            all_subjects: All subjects in an order that is the same for each shard; one may occur several times.
        """
        return set(list(dict.fromkeys(all_subjects))[self.number - 1 :: self.count])


def parse_shard(text: str) -> Shard:
    """Read `I/N`, such as `3/8`.

    Raises:
        ValueError: If it is not in this form, or I is not from 1 to N.
    """
    match = _SHARD.fullmatch(text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"{text!r} is not a shard; write I/N with I from 1 to N, as in 3/8 (sbatch --array=1-8)")
    return Shard(number, count)


@dataclass(frozen=True)
class ScanParts:
    """Results of scans in a folder, one file for each shard.

    Attributes:
        folder: Its files are readable by their owner only: they have the paths of scans.
        shard: The shard that this job reads; None merges all of them.
    """

    folder: Path
    shard: Shard | None

    def remove(self) -> None:
        """Remove the folder after its shards were merged."""
        shutil.rmtree(self.folder)


def read_scans(
    work: Callable[[Item], VerifiedScan],
    scans: Mapping[Item, str],
    *,
    parts: ScanParts | None,
    files: Callable[[Item], Iterable[Path]],
    settings: Mapping[str, Any],
    num_workers: int | None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
) -> list[tuple[Item, Outcome]]:
    """Read all scans, or those of a shard, whose file is then written; or load all scans from the files of the shards.

    Args:
        work: Validates a scan, or raises a `ScanError`. Not called by the merge.
        scans: All scans of the command with their subjects, in an order that is the same for each shard.
        parts: Where the files of the shards are; None reads all scans and writes no file.
        files: The files of a scan.
        settings: Options that change the result of `work`, as JSON values.
        num_workers: Processes that read scans; None for one per core.
        progress: Wraps the results, as tqdm does; called with their number.

    Returns:
        Scans and their results in the order of `scans`: those of the shard, or all.

    Raises:
        ManifestError: With all problems of the files: shards that are missing, or were read with other options, from
            other scans or with another number of shards, and scans that have changed since.
    """
    if parts is not None and parts.shard is None:
        return _load(parts.folder, list(scans), files=files, settings=settings)
    chosen, states = list(scans), {}
    if parts is not None and parts.shard is not None:
        mine = parts.shard.subjects(scans.values())
        chosen = [scan for scan, subject in scans.items() if subject in mine]
        # A folder that cannot be created is reported before scans are read.
        parts.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Before reading: a scan that changes meanwhile is then noticed by the merge.
        states = {scan: _states(files(scan)) for scan in chosen}
    results = map_unordered(partial(_attempt, work=work), chosen, num_workers=num_workers)
    outcomes = dict(progress(results, len(chosen)))
    if parts is not None and parts.shard is not None:
        head = {"shard": str(parts.shard), "work": _digest(scans, files=files, settings=settings)}
        numbers = {scan: number for number, scan in enumerate(scans)}
        lines = [[numbers[scan], states[scan], _to_json(outcomes[scan])] for scan in chosen]
        path = parts.folder / f"{parts.shard.number}-of-{parts.shard.count}.jsonl"
        write_atomically(path, (f"{json.dumps(line)}\n".encode() for line in (head, *lines)))
    return [(scan, outcomes[scan]) for scan in chosen]


def _attempt(scan: Item, *, work: Callable[[Item], VerifiedScan]) -> tuple[Item, Outcome]:
    try:
        return scan, work(scan)
    except ScanError as error:
        return scan, error.bare()


def _load(
    folder: Path, scans: Sequence[Item], *, files: Callable[[Item], Iterable[Path]], settings: Mapping[str, Any]
) -> list[tuple[Item, Outcome]]:
    heads: dict[Path, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            heads[path] = json.loads(file.readline())
    shards = {path: parse_shard(head["shard"]) for path, head in heads.items()}
    digest = _digest(scans, files=files, settings=settings)
    stale = {shards[path].number for path, head in heads.items() if head["work"] != digest}
    problems = list(_wrong_shards(list(shards.values())))
    if stale:
        problems.append(f"shards {_listed(stale)} were read with other options, or before scans were added or removed; "
                        "run them again with the options of --merge")  # fmt: skip
    if problems:
        raise ManifestError(problems, path=folder)
    found: dict[int, Outcome] = {}
    changed: set[int] = set()
    for path, shard in shards.items():
        with path.open(encoding="utf-8") as file:
            file.readline()
            for number, states, outcome in map(json.loads, file):
                found[number] = _from_json(outcome)
                if states != _states(files(scans[number])):
                    changed.add(shard.number)
    if changed:
        words = f"files have changed since shards {_listed(changed)} read them; run these again"
        raise ManifestError(words, path=folder)
    return [(scan, found[number]) for number, scan in enumerate(scans)]


def _wrong_shards(shards: Sequence[Shard]) -> Iterator[str]:
    """What is wrong with the numbers of the files."""
    if not shards:
        yield "no shard was read; run the same command with --shard I/N first"
        return
    counts = Counter(shard.count for shard in shards)
    if len(counts) > 1:
        listed = ", ".join(f"{number} of {count}" for count, number in sorted(counts.items()))
        yield f"shards of different divisions: {listed}; remove the files of all but one (I-of-N.jsonl)"
        return
    count = shards[0].count
    present = Counter(shard.number for shard in shards)
    if missing := {number for number in range(1, count + 1) if not present[number]}:
        yield f"missing shards of {count}: {_listed(missing)}; run them, then --merge again"
    if repeated := {number for number, times in present.items() if times > 1}:
        yield f"repeated shards of {count}: {_listed(repeated)}; remove all but one file of each"


def _listed(numbers: Iterable[int]) -> str:
    """Numbers as `sbatch --array` takes them: `1,3-5`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, each)) for each in ranges)


def _digest(scans: Iterable[Item], *, files: Callable[[Item], Iterable[Path]], settings: Mapping[str, Any]) -> str:
    """A hash of everything that the jobs must agree on: the scans in their order, and the options."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for scan in scans:
        digest.update(json.dumps([scan.modality, *map(str, files(scan))]).encode())
    return digest.hexdigest()


def _states(files: Iterable[Path]) -> list[list[int] | None]:
    """Size and modification time of files; None for a missing one."""
    states: list[list[int] | None] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            states.append(None)
        else:
            states.append([status.st_size, status.st_mtime_ns])
    return states


def _to_json(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, ScanError):
        return {"error": outcome.message, "path": outcome.path, "reason": str(outcome.reason)}
    warnings = {str(path): [str(code) for code in codes] for path, codes in outcome.warnings.items()}
    return {
        "num_frames": outcome.num_frames,
        "repetition_time": outcome.repetition_time,
        "num_b0": outcome.num_b0,
        "shells": [asdict(shell) for shell in outcome.shells],
        "warnings": warnings,
    }


def _from_json(content: dict[str, Any]) -> Outcome:
    if "error" in content:
        return ScanError(content["error"], path=content["path"], reason=content["reason"])
    shells = tuple(Shell(**shell) for shell in content.pop("shells"))
    warnings = {
        Path(path): tuple(ScanWarning(code) for code in codes) for path, codes in content.pop("warnings").items()
    }
    return VerifiedScan(**content, shells=shells, warnings=warnings)
