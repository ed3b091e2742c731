"""Export of manifests to Hugging Face `datasets`: rows with `messages`, `images` and `modalities`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.sample import Answer, Scan, Turn

if TYPE_CHECKING:
    from datasets import Dataset


def to_hf_dataset(manifest: Manifest) -> Dataset:
    """Convert a manifest to a `datasets.Dataset`, for libraries that train on `messages` and `images`.

    `dataset.to_json("rows.jsonl")` and `read_manifest("rows.jsonl", data_root=...)` give equal samples again, except
    for blanks at the ends of texts. The columns are those of `to_hf_rows`.

    Raises:
        ImportError: If the library `datasets` is missing.
        ManifestError: For an invalid row.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError("Hugging Face data sets need datasets: pip install datasets") from error
    # A generator writes the rows to an Arrow file on disk instead of keeping them in memory.
    return Dataset.from_generator(to_hf_rows, gen_kwargs={"manifest": manifest})


def to_hf_rows(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The rows of a manifest with one type per column, as Arrow requires.

    Yields:
        `id`, `subject` and `task`; `messages`, a list of `role` and `content`, which is a list of items of type `image`
        or `text`; `images`, the files of each scan in reading order, relative to the data root; `modalities`, one for
        each; `masks`, a brain mask or None for each; `answer`, a JSON string: its value may be a text or a number.

    Raises:
        ManifestError: For an invalid row.
    """
    root = manifest.data_root
    for sample in manifest:
        yield {
            "id": sample.id,
            "subject": sample.subject,
            "task": sample.task,
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in sample.messages],
            "images": [[path.relative_to(root).as_posix() for path in scan.paths] for scan in sample.scans],
            "modalities": list(sample.modalities),
            "masks": [scan.mask and scan.mask.relative_to(root).as_posix() for scan in sample.scans],
            "answer": _answer(sample.answer),
        }


def _content(turn: Turn) -> list[dict[str, str | None]]:
    return [
        {"type": "image", "text": None} if isinstance(item, Scan) else {"type": "text", "text": item}
        for item in turn.content
    ]


def _answer(answer: Answer | None) -> str | None:
    if answer is None:
        return None
    fields: dict[str, Any] = {"type": answer.type, "value": answer.value}
    fields |= {"options": list(answer.options)} if answer.options else {}
    fields |= {"unit": answer.unit} if answer.unit is not None else {}
    return json.dumps(fields, ensure_ascii=False)
