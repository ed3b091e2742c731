"""Manifests as Hugging Face rows: `messages` with places for images, and `images` with their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn

if TYPE_CHECKING:
    from datasets import Dataset

# A text that has one of these would be read back as the place of a scan.
_MARK = re.compile(r"<image(?:_\w+)?>")


def to_hf_dataset(manifest: Manifest) -> Dataset:
    """A manifest as a `datasets.Dataset`, for libraries that train on `messages` and `images`.

    Written with `dataset.to_json("rows.jsonl")` and read with `read_manifest("rows.jsonl", data_root=...)` it gives
    equal samples, but for blanks at the ends of texts, which no encoding keeps. Its columns are those of `to_hf_rows`.

    Raises:
        ImportError: Without the library `datasets`; the message names the extra to install.
        ManifestError: For a row that cannot be read.
        ValueError: For a text that has `<image>`.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError("Hugging Face data sets need datasets: pip install datasets") from error
    # From a generator: rows go to an Arrow file on disk, not to memory.
    return Dataset.from_generator(to_hf_rows, gen_kwargs={"manifest": manifest})


def to_hf_rows(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The rows of a manifest with one type a column, as Arrow asks for.

    Yields:
        `id`, `subject` and `task`; `messages`, a list of `role` and `content`, which is a list of items of type `image`
        or `text`; `images`, the files of each scan in reading order, relative to the data root; `modalities`, one for
        each; `masks`, a brain mask or None for each; `answer`, as JSON text, for its value may be a text or a number.

    Raises:
        ManifestError: For a row that cannot be read.
        ValueError: For a text that has `<image>`.
    """
    for row, sample in enumerate(manifest):
        try:
            yield _to_row(sample, manifest)
        except ValueError as error:
            raise ValueError(f"{manifest.path}, line {manifest.line(row)}: {error}") from error


def _to_row(sample: Sample, manifest: Manifest) -> dict[str, Any]:
    return {
        "id": sample.id,
        "subject": sample.subject,
        "task": sample.task,
        "messages": [{"role": turn.role, "content": _content(turn)} for turn in sample.messages],
        "images": [[path.relative_to(manifest.data_root).as_posix() for path in scan.paths] for scan in sample.scans],
        "modalities": list(sample.modalities),
        "masks": [scan.mask and scan.mask.relative_to(manifest.data_root).as_posix() for scan in sample.scans],
        "answer": _answer(sample.answer),
    }


def _content(turn: Turn) -> list[dict[str, str | None]]:
    items: list[dict[str, str | None]] = []
    for item in turn.content:
        if isinstance(item, Scan):
            items.append({"type": "image", "text": None})
        elif match := _MARK.search(item):
            raise ValueError(f"a text has {match.group()!r}, which would be read back as the place of a scan")
        else:
            items.append({"type": "text", "text": item})
    return items


def _answer(answer: Answer | None) -> str | None:
    if answer is None:
        return None
    facts: dict[str, Any] = {"type": answer.type, "value": answer.value}
    facts |= {"options": list(answer.options)} if answer.options else {}
    facts |= {"unit": answer.unit} if answer.unit is not None else {}
    return json.dumps(facts, ensure_ascii=False)
