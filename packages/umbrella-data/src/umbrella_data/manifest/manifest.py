"""Manifests: JSON Lines (or a JSON list) of conversations, read row by row through an index of byte offsets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, overload

from tqdm import tqdm

from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.paths import is_lost, stat_regular_file
from umbrella_data.manifest.dialects import to_canonical
from umbrella_data.manifest.index_file import SAVE_FROM_ROWS, open_index, save_index
from umbrella_data.manifest.row_columns import Progress, RowFacts, collect_facts, modalities_of
from umbrella_data.manifest.row_offsets import RowIndex, index_rows
from umbrella_data.manifest.sample import Answer, Role, Sample, Scan, Turn, parse_row, parse_turns

__all__ = ["Answer", "Manifest", "Role", "Sample", "Scan", "Turn", "read_manifest"]


class Manifest(Sequence[Sample]):
    """The samples of one manifest, parsed on access; memory has offsets, not rows.

    Args:
        path: The manifest file.
        data_root: Folder that the rows' paths are relative to, and may not leave.
        index: Where each row is in the file.
        facts: What is known of each row; None reads every row once when it is first asked for.
        index_dir: Where the index is kept; None keeps that of a large manifest next to it.
    """

    def __init__(
        self,
        path: Path,
        *,
        data_root: Path,
        index: RowIndex,
        facts: RowFacts | None = None,
        index_dir: Path | None = None,
    ) -> None:
        self.path = path
        self.data_root = data_root
        self._index = index
        self._facts = facts
        self.index_dir = index_dir

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample of a row.

        Raises:
            ManifestError: With every problem of that row.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._row(range(len(self))[index])
        sample, problems = parse_row(row, root=self.data_root)
        if sample is None:
            raise ManifestError([self._at(index, problem) for problem in problems], path=self.path)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def facts(self) -> RowFacts:
        """Modalities and lengths of all rows. The first call reads every row once, or maps the saved index.

        Raises:
            ManifestError: With the problems of all rows that cannot be read.
        """
        return self.index_rows() if self._facts is None else self._facts

    def index_rows(self, *, progress: Progress | None = None) -> RowFacts:
        """Read every row once and save what is found, unless the index is there already.

        A manifest of many rows is indexed in a file next to it (or in the user's cache, where nothing can be written
        there), a small one in memory. Every process maps the same file.

        Args:
            progress: Wraps the numbers of the rows while they are read; None shows a bar on a terminal.

        Raises:
            ManifestError: With the problems of all rows that cannot be read.
        """
        if self._facts is None:
            self._facts = collect_facts(len(self), read=self._readable_row, path=str(self.path),
                                        progress=progress or self._show_progress)  # fmt: skip
            if self.index_dir is not None or len(self) >= SAVE_FROM_ROWS:
                arrays = {**self._index.arrays, **self._facts.arrays}
                combinations = self._facts.combinations
                saved = save_index(self.path, arrays, combinations=combinations, index_dir=self.index_dir)
                if saved is not None:
                    self._index = RowIndex(self.path, arrays=saved)
                    self._facts = RowFacts(saved, combinations=combinations)
        return self._facts

    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan of a row in reading order; no scan is opened, no path looked at."""
        if self._facts is not None:
            return self._facts.modalities(index)
        return modalities_of(self._readable_row(index))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation of a row, to measure it: its paths are not looked at, and its scans have none.

        Raises:
            ManifestError: With every problem of the turns.
        """
        turns, problems = parse_turns(self._row(index))
        if problems:
            raise ManifestError([self._at(index, problem) for problem in problems], path=self.path)
        return turns

    def num_bytes(self, index: int) -> int:
        """Length of a row in the file: a cheap measure of its text."""
        return self._index.num_bytes(index)

    def line(self, index: int) -> int:
        """The line of a row's first byte in the file, from 1."""
        return self._index.line(index)

    def validate(self, *, check_files: bool = True) -> None:
        """Read every row.

        Args:
            check_files: Also look whether every scan file exists; none is opened.

        Raises:
            ManifestError: With all problems of all rows.
        """
        problems: list[str] = []
        line_of_id: dict[str, int] = {}
        for index in range(len(self)):
            try:
                sample = self[index]
            except ManifestError as error:
                problems += error.problems
                continue
            first = line_of_id.setdefault(sample.id, self.line(index))
            if first != self.line(index):
                problems.append(self._at(index, f"id {sample.id!r} is in line {first} already; ids are unique"))
            if check_files:
                problems += [self._at(index, problem) for problem in self._missing_files(sample)]
        if problems:
            raise ManifestError(problems, path=self.path)

    def _missing_files(self, sample: Sample) -> Iterator[str]:
        for path in (path for scan in sample.scans for path in scan.files):
            try:
                stat_regular_file(path)
            except ScanError as error:
                name = path.relative_to(self.data_root)
                if is_lost(error):
                    words = f"no file {name} under {self.data_root}; is data_root right?"
                else:
                    words = f"{name}: {error.message}"
                yield f"subject {sample.subject!r}: {words}"

    def _row(self, index: int) -> Any:
        try:
            text = self._index.read(index).decode("utf-8")
            return to_canonical(_DECODER.decode(text), root=self.data_root)
        except ValueError as error:  # includes JSONDecodeError, UnicodeDecodeError and what an adapter rejects
            raise ManifestError(self._at(index, str(error)), path=self.path) from error

    def _readable_row(self, index: int) -> Any:
        """A canonical row whose turns and modalities can be read; its paths and its answer may still be wrong."""
        row = self._row(index)
        try:
            modalities_of(row)
        except (KeyError, TypeError, AttributeError, ValueError):
            self[index]  # says all that is wrong with the row
            raise
        return row

    def _show_progress(self, rows: Iterable[int]) -> Iterable[int]:
        return tqdm(rows, desc=f"indexing {self.path.name}", unit="row", delay=1, disable=None)

    def _at(self, index: int, problem: str) -> str:
        return f"line {self.line(range(len(self))[index])}: {problem}"


def read_manifest(
    path: str | PathLike[str],
    *,
    data_root: str | PathLike[str] | None = None,
    index_dir: str | PathLike[str] | None = None,
) -> Manifest:
    """Open a manifest: `.jsonl` with one conversation a line, or `.json` with a list of them.

    A row, which stands on one line:

        {"id": "sub-01_sex", "subject": "sub-01", "task": "sex",
         "messages": [{"role": "user", "content": [
                          {"type": "image", "modality": "T1", "path": "sub-01/anat/sub-01_T1w.nii.gz"},
                          {"type": "text", "text": "What is the sex of this person?"}]},
                      {"role": "assistant", "content": "female"}],
         "answer": {"type": "choice", "options": ["female", "male"], "value": "female"}}

    `task` and `answer` may be left out; an answer lets the row be scored, and is a `choice`, a `number` with its
    `unit`, or a `text`. An image may name its brain `mask`. Rows of other dialects are known by their keys; see
    `umbrella_data.manifest.dialects`.

    Args:
        path: The manifest.
        data_root: Folder that the paths in it are relative to; by default the manifest's own.
        index_dir: Where its index is kept; by default next to it, and only where it has many rows.

    Raises:
        ManifestError: If there is no such file or folder, or no row in it. Rows are read on access: `validate()`
            reads them all.
    """
    file = Path(path)
    if not file.is_file():
        raise ManifestError("no such file", path=file)
    root = (Path(data_root) if data_root is not None else file.parent).resolve()
    if not root.is_dir():
        raise ManifestError(f"data_root {root} is no folder", path=file)
    kept = Path(index_dir) if index_dir is not None else None
    if (saved := open_index(file, index_dir=kept)) is not None:
        facts = RowFacts(saved, combinations=saved.facts["combinations"])
        return Manifest(file, data_root=root, index=RowIndex(file, arrays=saved), facts=facts, index_dir=kept)
    try:
        index = index_rows(file)
    except ValueError as error:
        raise ManifestError(str(error), path=file) from error
    if len(index) == 0:
        raise ManifestError("has no rows", path=file)
    return Manifest(file, data_root=root, index=index, index_dir=kept)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; leave the key out where there is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
