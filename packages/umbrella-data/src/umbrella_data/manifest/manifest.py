"""Manifests in JSON Lines (or a JSON list): random access to samples through an index of byte offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.files.paths import is_lost, stat_regular_file
from umbrella_data.manifest.dialects import to_canonical
from umbrella_data.manifest.index_file import SAVE_FROM_ROWS, open_index, save_index
from umbrella_data.manifest.row_columns import Progress, RowFacts, collect_facts, modalities_of
from umbrella_data.manifest.row_json import TOO_DEEP, decode_row
from umbrella_data.manifest.row_offsets import RowIndex, index_rows
from umbrella_data.manifest.row_validation import parse_row, parse_turns
from umbrella_data.manifest.sample import Sample, Turn
from umbrella_data.progress import progress_bar


class Manifest(Sequence[Sample]):
    """The samples of one manifest, validated on access; only byte offsets are kept in memory.

    Args:
        path: The manifest file.
        data_root: Folder that paths of rows are relative to and must be inside of.
        index: Byte offsets of the rows.
        facts: Modalities and lengths of the rows; None reads every row once when they are first needed.
        index_dir: Folder of the saved index; None saves that of a large manifest next to it.
        may_end_with_user: Whether rows may end with the user's turn, to generate answers for them.
    """

    def __init__(
        self,
        path: Path,
        *,
        data_root: Path,
        index: RowIndex,
        facts: RowFacts | None = None,
        index_dir: Path | None = None,
        may_end_with_user: bool = False,
    ) -> None:
        self.path = path
        self.data_root = data_root
        self._index = index
        self._facts = facts
        self.index_dir = index_dir
        self._may_end_with_user = may_end_with_user
        self.selected_from: tuple[Manifest, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read and validate a row.

        Raises:
            ManifestError: With every problem of that row.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._row(range(len(self))[index])
        try:
            sample, problems = parse_row(row, root=self.data_root, may_end_with_user=self._may_end_with_user)
        except RecursionError as error:  # nested less deeply than the decoder permits
            raise ManifestError(self._at(index, TOO_DEEP), path=self.path) from error
        if sample is None:
            raise ManifestError([self._at(index, problem) for problem in problems], path=self.path)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def whole(self) -> Manifest:
        """The manifest with all rows of the file; itself, unless it is from `select`."""
        return self if self.selected_from is None else self.selected_from[0]

    @property
    def rows(self) -> NDArray[np.int64] | None:
        """The numbers of its rows in `whole`, (N,), if it is from `select`."""
        return None if self.selected_from is None else self.selected_from[1]

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Manifest:
        """A manifest of some of the rows, in the given order; no file is read or written.

        Its facts and lengths are those of the whole manifest, also from a saved index; line numbers are those in the
        file.

        Args:
            rows: Numbers of rows from 0, (N,).

        Raises:
            IndexError: For a number that is no row.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"rows from {chosen.min()} to {chosen.max()} are not all within 0 to {len(self) - 1}")
        part = Manifest(
            self.path,
            data_root=self.data_root,
            index=self._index.select(chosen),
            index_dir=self.index_dir,
            may_end_with_user=self._may_end_with_user,
        )
        part.selected_from = (self.whole, chosen if self.rows is None else self.rows[chosen])
        return part

    @property
    def facts(self) -> RowFacts:
        """Modalities and lengths of all rows; without a saved index, the first access reads every row once.

        Raises:
            ManifestError: With the problems of all invalid rows.
        """
        return self.index_rows() if self._facts is None else self._facts

    def index_rows(self, *, progress: Progress | None = None) -> RowFacts:
        """Read every row once and build the index, unless there is a saved one.

        The index of a small manifest stays in memory. That of a large one is saved next to the manifest, or in the
        user's cache if that folder is not writable; all processes map the same file.

        Args:
            progress: Wraps the row numbers while rows are read; None: `progress_bar`, after a second.

        Raises:
            ManifestError: With the problems of all invalid rows.
        """
        if self._facts is None and self.selected_from is not None:
            whole, rows = self.selected_from
            self._facts = whole.index_rows(progress=progress).select(rows)
        if self._facts is None:
            if progress is None:
                progress = partial(progress_bar, words=f"indexing {self.path.name}", unit="row", delay=1)
            self._facts = collect_facts(len(self), read=self._readable_row, path=str(self.path), progress=progress)
            if self.index_dir is not None or len(self) >= SAVE_FROM_ROWS:
                arrays = {**self._index.arrays, **self._facts.arrays}
                combinations = self._facts.combinations
                saved = save_index(self.path, arrays, combinations=combinations, index_dir=self.index_dir)
                if saved is not None:
                    self._index = RowIndex(self.path, arrays=saved)
                    self._facts = RowFacts(saved, combinations=combinations)
        return self._facts

    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan of a row in reading order; no file of a scan is accessed."""
        if self._facts is not None:
            return self._facts.modalities(index)
        return modalities_of(self._readable_row(index))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation of a row without the paths of its scans, to measure its length.

        Raises:
            ManifestError: With every problem of the turns.
        """
        row = self._row(index)
        messages = row.get("messages") if isinstance(row, Mapping) else None
        try:
            turns, problems = parse_turns(messages, may_end_with_user=self._may_end_with_user)
        except RecursionError as error:
            raise ManifestError(self._at(index, TOO_DEEP), path=self.path) from error
        if problems:
            raise ManifestError([self._at(index, problem) for problem in problems], path=self.path)
        return turns

    def line(self, index: int) -> int:
        """The line number of a row in the file, from 1."""
        return self._index.line(index)

    def validate(self, *, check_files: bool = True) -> None:
        """Validate every row.

        Args:
            check_files: Also check that every scan file exists; none is opened.

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
                problems.append(self._at(index, f"duplicate id {sample.id!r}, also in line {first}; ids are unique"))
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
                    problem = f"no file {name} under {self.data_root}; check data_root"
                else:
                    problem = f"{name}: {error.message}"
                yield f"subject {sample.subject!r}: {problem}"

    def _row(self, index: int) -> Any:
        try:
            return to_canonical(decode_row(self._index.read(index)), root=self.data_root)
        except ValueError as error:  # includes errors of adapters
            raise ManifestError(self._at(index, str(error)), path=self.path) from error
        except RecursionError as error:
            raise ManifestError(self._at(index, TOO_DEEP), path=self.path) from error

    def _readable_row(self, index: int) -> Any:
        """A canonical row with valid modalities; its texts, paths and answer are not validated."""
        row = self._row(index)
        try:
            modalities_of(row)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            self[index]  # raises a ManifestError with all problems of the row
            raise
        return row

    def _at(self, index: int, problem: str) -> str:
        return f"line {self.line(range(len(self))[index])}: {problem}"


def read_manifest(
    path: str | PathLike[str],
    *,
    data_root: str | PathLike[str] | None = None,
    index_dir: str | PathLike[str] | None = None,
    may_end_with_user: bool = False,
) -> Manifest:
    """Open a manifest: `.jsonl` with one conversation per line, or `.json` with a list of them.

    A row (in `.jsonl`, on one line):

        {"id": "sub-01_sex", "subject": "sub-01", "task": "sex",
         "messages": [{"role": "user", "content": [
                          {"type": "image", "modality": "T1", "path": "sub-01/anat/sub-01_T1w.nii.gz"},
                          {"type": "text", "text": "What is the sex of this person?"}]},
                      {"role": "assistant", "content": "female"}],
         "answer": {"type": "choice", "options": ["female", "male"], "value": "female"}}

    `task` and `answer` are optional. An answer makes the row scorable: a `choice`, a `number` with its `unit`, or a
    `text`. An image may have a brain `mask`. Other dialects are recognised by the keys of the row, see
    `umbrella_data.manifest.dialects`.

    Args:
        path: The manifest.
        data_root: Folder that its paths are relative to; the manifest's folder by default.
        index_dir: Folder of its saved index; by default, only the index of a large manifest is saved, next to it.
        may_end_with_user: Whether rows may end with the user's turn: prompts without an answer, which cannot be trained
            on.

    Raises:
        ManifestError: If the file or the folder does not exist, or there is no row. Rows are validated on access;
            `validate()` validates all of them.
    """
    file = Path(path)
    try:
        stat_regular_file(file)
    except ScanError as error:
        raise ManifestError(error.message, path=file) from error
    root = (Path(data_root) if data_root is not None else file.parent).resolve()
    if not root.is_dir():
        raise ManifestError(f"data_root {root} is not a folder", path=file)
    folder = Path(index_dir) if index_dir is not None else None
    make = partial(Manifest, file, data_root=root, index_dir=folder, may_end_with_user=may_end_with_user)
    if (saved := open_index(file, index_dir=folder)) is not None:
        index, facts = RowIndex(file, arrays=saved), RowFacts(saved, combinations=saved.facts["combinations"])
        return make(index=index, facts=facts)
    try:
        index = index_rows(file)
    except ValueError as error:
        raise ManifestError(str(error), path=file) from error
    if len(index) == 0:
        raise ManifestError("no rows", path=file)
    return make(index=index)
