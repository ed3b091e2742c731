"""What a model saw in training, so that it is asked in the same way: brain masks, and reasoning before answers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from umbrella_data.chat.layout import starts_with_reasoning
from umbrella_data.manifest.sample import Sample
from umbrella_train.assembly.subject_parts import open_source
from umbrella_train.config import DatasetConfig
from umbrella_train.processor import other_mask

logger = logging.getLogger(__name__)

# Rows of each manifest that are looked at, evenly spread.
_MAX_ROWS = 1_000


def masked_modalities(sources: Sequence[DatasetConfig]) -> dict[str, bool]:
    """By modality, whether its scans have brain masks; a modality is absent if some have one and others have none.

    Of each manifest, a thousand rows are looked at, and no scan is opened.
    """
    found: dict[str, set[bool]] = defaultdict(set)
    for source in sources:
        for sample in _some_rows(source):
            for scan in sample.scans:
                found[scan.modality].add(scan.mask is not None)
    return {modality: values.pop() for modality, values in found.items() if len(values) == 1}


def answers_start_with_reasoning(sources: Sequence[DatasetConfig]) -> bool:
    """Whether all answers start with a block of reasoning, see `ChatEncoder`; of each manifest, a thousand rows."""
    rows = (sample for source in sources for sample in _some_rows(source))
    return all(starts_with_reasoning(sample.messages[-1]) for sample in rows)


def warn_of_other_masks(sources: Sequence[DatasetConfig], *, trained: Mapping[str, bool]) -> None:
    """Warns of modalities whose scans have masks here and had none in training (`trained`), or the other way round."""
    for modality, is_masked in masked_modalities(sources).items():
        if problem := other_mask(modality, trained=trained, is_masked=is_masked):
            logger.warning("%s", problem)


def _some_rows(source: DatasetConfig) -> Iterator[Sample]:
    manifest = open_source(source, may_end_with_user=True)
    return (manifest[row] for row in range(0, len(manifest), -(-len(manifest) // _MAX_ROWS)))
