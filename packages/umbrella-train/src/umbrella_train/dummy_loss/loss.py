"""The dummy loss: keeps the patch embeds of absent modalities in every step's graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class DummyLoss:
    """The loss of a model's dummy terms, to be added to the task loss.

    A term is sum(p) / sqrt(N) over the N trainable elements of an absent modality's patch embed, so its gradient has an
    L2 norm of 1 and that of the loss one of `scale`.

    Attributes:
        scale: Gradient norm that an absent modality receives (`reduction="unit"`). 0 keeps the graph with exact zeros.
        reduction: `unit`, or `sum`: the literal `param.sum() * scale`, whose gradient norm grows with sqrt(N).
        sizes: N of each modality (`model.dummy_sizes()`), needed only for `sum`.

    Raises:
        ValueError: A negative scale, an unknown reduction, or `sum` without sizes.
    """

    scale: float = 1e-7
    reduction: Literal["unit", "sum"] = "unit"
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale must be finite and not negative, got {self.scale}")
        if self.reduction not in ("unit", "sum"):
            raise ValueError(f"reduction must be 'unit' or 'sum', got {self.reduction!r}")
        if self.reduction == "sum" and not self.sizes:
            raise ValueError("reduction='sum' needs the sizes of the patch embeds: sizes=model.dummy_sizes()")

    def weight(self, modality: str) -> float:
        """Factor of a modality's term, which is also the norm of its gradient."""
        return self.scale * (math.sqrt(self.sizes[modality]) if self.reduction == "sum" else 1.0)

    def __call__(self, terms: Mapping[str, Tensor] | None) -> Tensor:
        """The loss of the absent modalities.

        Args:
            terms: A model's `dummy_terms`: 0-dim float32 tensors by modality.

        Returns:
            A 0-dim float32 tensor; zero without a graph if no modality is absent.
        """
        if not terms:
            return torch.zeros(())
        return torch.stack([self.weight(modality) * term for modality, term in terms.items()]).sum()
