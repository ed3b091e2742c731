"""Number of tokens of every sample of a manifest, image tokens included; measured once and saved with its index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.chat.number_targets import NumberTargets
from umbrella_data.chat.row_check import encoding_problems
from umbrella_data.errors import ManifestError
from umbrella_data.manifest.index_file import SAVE_FROM_ROWS, open_index, save_index
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.manifest.row_columns import MAX_PROBLEMS, RowFacts
from umbrella_data.manifest.sample import Turn
from umbrella_data.progress import progress_bar

# Rows per call of the tokenizer, which processes them in parallel.
_CHUNK = 2048


def measure_samples(
    manifest: Manifest, *, encoder: ChatEncoder, max_length: int | None = None, numbers: NumberTargets | None = None
) -> RowFacts:
    """Measure every sample, or memory-map saved lengths; no scan is opened.

    Args:
        manifest: The samples.
        encoder: Tokenizer and numbers of image tokens.
        max_length: Maximum number of positions of an example; whole turns are dropped from the front to fit.
        numbers: How numbers are written in the answers; None as in the rows.

    Returns:
        Facts with `lengths` (N,) uint32, the positions of each example, and the modalities of its remaining scans.

    Raises:
        ManifestError: With the problems of all rows that are invalid or do not fit into `max_length`.
    """
    numbers = numbers or NumberTargets()
    if manifest.rows is not None:
        return measure_samples(manifest.whole, encoder=encoder, max_length=max_length, numbers=numbers).select(
            manifest.rows
        )
    kind = _kind(encoder, max_length, numbers)
    if kind is not None and (saved := open_index(manifest.path, kind=kind, index_dir=manifest.index_dir)) is not None:
        return RowFacts(saved, combinations=saved.facts["combinations"])
    facts = _measure(manifest, encoder, max_length, numbers)
    if kind is not None and (manifest.index_dir is not None or len(manifest) >= SAVE_FROM_ROWS):
        saved = save_index(manifest.path, facts.arrays, kind=kind, combinations=facts.combinations,
                           index_dir=manifest.index_dir)  # fmt: skip
        return facts if saved is None else RowFacts(saved, combinations=facts.combinations)
    return facts


def _kind(encoder: ChatEncoder, max_length: int | None, numbers: NumberTargets) -> str | None:
    if encoder.fingerprint is None:
        return None
    written = [] if numbers.decimals is None else [numbers.decimals]
    facts = json.dumps([encoder.fingerprint, max_length, sorted(encoder.num_image_tokens.items()), *written])
    return f"lengths-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def _measure(manifest: Manifest, encoder: ChatEncoder, max_length: int | None, numbers: NumberTargets) -> RowFacts:
    facts = manifest.facts
    num_rows = len(manifest)
    codes = np.array(facts.arrays["codes"])
    lengths = facts.image_tokens(np.arange(num_rows), num_image_tokens=encoder.num_image_tokens)
    code_of = {names: code for code, names in enumerate(facts.combinations)}
    problems: list[str] = []
    with progress_bar(total=num_rows, words=f"measuring {manifest.path.name}", unit="row", delay=1) as bar:
        for first in range(0, num_rows, _CHUNK):
            rows = range(first, min(first + _CHUNK, num_rows))
            conversations = _read(manifest, rows, numbers, problems)
            try:
                lengths[rows.start : rows.stop] += encoder.count_text_tokens(conversations)
            except ValueError:
                problems += [problem for _, problem in encoding_problems(manifest, encoder, rows=rows, numbers=numbers)]
                break
            for row in rows if max_length is not None else ():
                if lengths[row] > max_length:
                    # The scans of dropped turns are dropped too.
                    lengths[row], names = _cut(manifest, row, conversations[row - first], encoder, max_length, problems)
                    codes[row] = code_of.setdefault(names, len(code_of))
            bar.update(len(rows))
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise ManifestError(problems, path=manifest.path)
    return RowFacts({"codes": codes, "lengths": lengths.astype(np.uint32)}, combinations=list(code_of))


def _read(manifest: Manifest, rows: range, numbers: NumberTargets, problems: list[str]) -> list[tuple[Turn, ...]]:
    # Turns alone are read faster than samples with their paths.
    read = manifest.turns if numbers.decimals is None else (lambda row: numbers.write(manifest[row]))
    conversations = []
    for row in rows:
        try:
            conversations.append(read(row))
        except ManifestError as error:
            problems += error.problems
            conversations.append((Turn("user", ("",)), Turn("assistant", ("",))))
    return conversations


def _cut(
    manifest: Manifest,
    row: int,
    messages: Sequence[Turn],
    encoder: ChatEncoder,
    max_length: int | None,
    problems: list[str],
) -> tuple[int, tuple[str, ...]]:
    try:
        encoded = encoder.encode(messages, max_length=max_length)
    except ValueError as error:
        problems.append(f"line {manifest.line(row)}: {error}")
        return 0, ()
    return len(encoded.input_ids), tuple(scan.modality for scan in encoded.scans)
