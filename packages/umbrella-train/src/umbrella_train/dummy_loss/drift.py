"""Forecast of how far the dummy gradient moves the patch embed of an absent modality.

An adaptive optimizer divides a gradient by its running size. A modality that is never seen has only the dummy gradient,
g per element, and moves by lr * g / (g + eps) at every step, however small g is. A modality that is seen occasionally
has a running size from its real gradients, and hardly moves.

The forecast follows Adam's recursion (Kingma and Ba, arXiv:1412.6980, algorithm 1) for the dummy's part of the first
moment and for the expected second moment of one element, with numbers on the host alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from scipy.integrate import quad

Rule = Literal["adam", "sgd", "adafactor"]


@dataclass(frozen=True)
class OptimizerFacts:
    """Rule and constants of the optimizer.

    Attributes:
        rule: How a gradient becomes a step.
        beta1: Decay of the first moment; momentum for SGD.
        beta2: Decay of the second moment.
        eps: Adam's eps.
    """

    rule: Rule = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class DriftForecast:
    """Forecast for one modality.

    Args:
        num_elements: N, the trainable elements of its patch embed.
        gradient_norm: L2 norm of the dummy gradient (`DummyLoss.weight`).
        optimizer: Its rule and constants.

    Attributes:
        total: Mean distance that the dummy gradient has moved an element.
        since_seen: The same since the modality was last in a batch.
        steps_absent: Optimizer steps since then.
    """

    def __init__(self, *, num_elements: int, gradient_norm: float, optimizer: OptimizerFacts) -> None:
        self._count = num_elements
        self._dummy = gradient_norm / math.sqrt(num_elements)
        self._optimizer = optimizer
        self._first = 0.0
        self._dummy_square = 0.0
        self._real_square = 0.0
        self._weights, self._weights_squared = 0.0, 0.0
        self._steps = 0
        self.total = 0.0
        self.since_seen = 0.0
        self.steps_absent = 0

    def step(self, *, learning_rate: float, real_norm: float | None = None, clip: float = 1.0) -> None:
        """Adds one optimizer step.

        Args:
            learning_rate: Of this step.
            real_norm: L2 norm of the modality's gradient if it was in the batch, None if it was absent.
            clip: Factor of gradient clipping.
        """
        is_absent = real_norm is None
        self._steps += 1
        if is_absent:
            self.steps_absent += 1
        else:
            self.steps_absent, self.since_seen = 0, 0.0
        gradient = clip * self._dummy if is_absent else 0.0
        rule = {"sgd": self._sgd, "adam": self._adam, "adafactor": self._adafactor}[self._optimizer.rule]
        moved = learning_rate * rule(gradient, clip * (real_norm or 0.0))
        self.total += moved
        self.since_seen += moved if is_absent else 0.0

    def state_dict(self) -> dict[str, float]:
        """The state as JSON numbers."""
        return {key: value for key, value in vars(self).items() if key not in ("_count", "_dummy", "_optimizer")}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores a state."""
        vars(self).update(state)

    def _sgd(self, gradient: float, _real_norm: float) -> float:
        self._first = self._optimizer.beta1 * self._first + gradient
        return self._first

    def _adafactor(self, gradient: float, real_norm: float) -> float:
        # The second moment is a mean over rows and columns, whose spread over elements is small and is ignored.
        beta2 = 1 - self._steps**-0.8
        self._dummy_square = beta2 * self._dummy_square + (1 - beta2) * gradient**2
        self._real_square = beta2 * self._real_square + (1 - beta2) * real_norm**2 / self._count
        size = math.sqrt(self._dummy_square + self._real_square)
        return min(gradient / size, 1.0) if size else 0.0

    def _adam(self, gradient: float, real_norm: float) -> float:
        beta1, beta2 = self._optimizer.beta1, self._optimizer.beta2
        self._first = beta1 * self._first + (1 - beta1) * gradient
        self._dummy_square = beta2 * self._dummy_square + (1 - beta2) * gradient**2
        self._real_square = beta2 * self._real_square + (1 - beta2) * real_norm**2 / self._count
        seen = float(real_norm > 0)
        self._weights = beta2 * self._weights + (1 - beta2) * seen
        self._weights_squared = beta2**2 * self._weights_squared + (1 - beta2) ** 2 * seen
        first = self._first / (1 - beta1**self._steps)
        correction = 1 - beta2**self._steps
        # The number of equally weighted gradients with the information of the exponentially weighted ones.
        effective = self._weights**2 / self._weights_squared if self._weights_squared else 0.0
        return first * mean_inverse_size(
            real=math.sqrt(self._real_square / correction),
            dummy=math.sqrt(self._dummy_square / correction),
            num_gradients=effective,
            eps=self._optimizer.eps,
        )


def mean_inverse_size(*, real: float, dummy: float, num_gradients: float, eps: float) -> float:
    """Expected 1 / (sqrt(v) + eps) over the elements of a tensor.

    The real part of v is modelled as the mean square of `num_gradients` normal gradients, which is chi-square
    distributed: after few of them, v is tiny for some elements, which move far.

    Args:
        real: Root mean square of the real gradients' part of v.
        dummy: Root of the dummy gradients' part.
        num_gradients: Number of real gradients in v, 0 for none.
        eps: Adam's eps.
    """
    if not real or num_gradients <= 0:
        return 1 / (dummy + eps)
    # Rounded to 1 %, so that most steps find a cached value.
    arguments = (max(num_gradients, 1.0), dummy / real, eps / real)
    return _mean_inverse(*(_rounded(value) for value in arguments)) / real


def _rounded(value: float) -> float:
    return math.exp(round(math.log(value) * 100) / 100) if value > 1e-12 else 0.0


@lru_cache(maxsize=4096)
def _mean_inverse(degrees: float, dummy: float, eps: float) -> float:
    """E[1 / (sqrt(c + dummy^2) + eps)] with c = chi-square(degrees) / degrees."""
    log_norm = math.log(2) + degrees / 2 * math.log(degrees / 2) - math.lgamma(degrees / 2)

    def integrand(log_size: float) -> float:
        # The density of s = sqrt(c) is 2 (k/2)^(k/2) / Gamma(k/2) s^(k-1) exp(-k s^2 / 2); ds = s d(log s).
        size = math.exp(log_size)
        density = math.exp(log_norm + degrees * log_size - degrees * size**2 / 2)
        return density / (math.sqrt(size**2 + dummy**2) + eps)

    width = 8 / math.sqrt(degrees)
    # With a single gradient the smallest elements dominate, down to where dummy and eps take over.
    lowest = -width - (math.log(1 / max(dummy + eps, 1e-12)) if degrees < 4 else 0)
    value, _ = quad(integrand, lowest, min(width, 2.0), limit=200)
    return float(value)
