"""From log-likelihoods to probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def softmax(log_scores: ArrayLike, *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities (N, K) from log-likelihoods (N, K), which are divided by the temperature (Guo et al. 2017)."""
    scaled = np.asarray(log_scores, dtype=np.float64) / temperature
    shifted = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities
