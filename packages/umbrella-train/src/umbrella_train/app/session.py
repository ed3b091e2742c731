"""The model of the page, loaded once, and the scan that is asked about. No file is kept: the scan is a tensor."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from umbrella_data.manifest.sample import Scan
from umbrella_data.preview.scan_viewer import header_warnings, scan_viewer
from umbrella_train.assembly.predict import (
    answer_batch,
    find_model,
    known_modality,
    load_model,
    load_processor,
    question_batch,
)
from umbrella_train.errors import RunError
from umbrella_train.processor import other_mask


@dataclass(frozen=True)
class PreparedScan:
    """A scan after its pipeline.

    Attributes:
        key: A random name: a question names the scan that it is about.
        scan: Modality and files; the files may be removed.
        volume: (C, X, Y, Z) or (C, X, Y, Z, T), what the model sees.
        viewer: HTML of its viewer, see `umbrella_data.viewer`.
        warning: A line for what differs from the scans of training, and for each suspicious header; None without any.
    """

    key: str
    scan: Scan
    volume: Tensor
    viewer: str
    warning: str | None


class Session:
    """One model and at most one scan.

    Args:
        folder: As of `umbrella_train.assembly.predict.predict`.
        max_new_tokens: Longest answer in tokens.
        device: Device to use; None takes the GPU if there is one.

    Attributes:
        prepared: The scan that is asked about; None before the first, and after it was removed.

    Raises:
        RunError: There is no model, or it cannot be loaded.
    """

    def __init__(self, folder: Path, *, max_new_tokens: int, device: torch.device | str | None) -> None:
        model_folder = find_model(folder)
        self._processor = load_processor(model_folder)
        self._model = load_model(model_folder, device=device)
        self._max_new_tokens = max_new_tokens
        self.prepared: PreparedScan | None = None

    @property
    def modalities(self) -> Sequence[str]:
        """The modalities of the model."""
        return self._processor.modality_order

    def prepare(self, modality: str, paths: Sequence[Path], *, mask: Path | None = None) -> PreparedScan:
        """Replaces the scan; without one, if this one cannot be used. The files are not needed afterwards.

        Raises:
            RunError: The model does not have the modality.
            ScanError: The scan is damaged or inconsistent.
        """
        self.prepared = None
        scan = Scan(known_modality(modality, self._processor), tuple(paths), mask=mask)
        volume = self._processor.load_scan(scan)
        pipeline = self._processor.pipeline_of(scan.modality)
        unlike = other_mask(scan.modality, trained=self._processor.masked, is_masked=mask is not None)
        warnings = [*([unlike] if unlike else []), *header_warnings(paths, spec=pipeline.spec)]
        self.prepared = PreparedScan(
            key=secrets.token_urlsafe(12),
            scan=scan,
            volume=volume,
            viewer=scan_viewer(volume, pipeline=pipeline, paths=paths, mask=mask, is_open=True),
            warning="\n".join(warnings) or None,
        )
        return self.prepared

    def find(self, key: str) -> PreparedScan:
        """The scan of this name.

        Raises:
            RunError: It was replaced or removed.
        """
        prepared = self.prepared
        if prepared is None or prepared.key != key:
            raise RunError("this scan was replaced or removed, perhaps in another window; give it again")
        return prepared

    def answer(self, key: str, question: str) -> str:
        """The answer to a question about the scan, that of `umbrella_train.assembly.predict.predict`.

        Raises:
            RunError: There is no question, it has markup, or the scan was replaced or removed.
        """
        prepared = self.find(key)
        if not question.strip():
            raise RunError("there is no question")
        batch = question_batch(self._processor, question, [prepared.scan], load=lambda _: prepared.volume)
        return answer_batch(self._model, self._processor, batch, max_new_tokens=self._max_new_tokens)
