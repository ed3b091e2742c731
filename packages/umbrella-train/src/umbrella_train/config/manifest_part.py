"""A part of a manifest as a source of samples, for parts that are computed and not written in a configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import InstanceOf

from umbrella_train.config.data import DatasetConfig


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a manifest.

    Attributes:
        numbers: Their numbers from 0, (N,), in increasing order.
    """

    numbers: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """A hash of the numbers."""
        return hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()[:16]


class ManifestPart(DatasetConfig):
    """Some rows of a manifest; `umbrella_train.assembly.subject_parts.open_source` opens it."""

    rows: InstanceOf[Rows]
    """The rows."""
