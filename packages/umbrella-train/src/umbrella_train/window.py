"""What the ranks agree on once an optimiser step: is the loss finite, which modalities were seen, gradient norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class WindowFacts:
    """Facts of one accumulation window, the same on every rank.

    Attributes:
        is_finite: Whether every loss on every rank was finite.
        is_stop_asked: Whether some rank was asked to stop.
        present: Modalities that some rank saw.
        norms: Squared gradient norms summed over ranks, empty where none were asked for.
    """

    is_finite: bool
    is_stop_asked: bool
    present: frozenset[str]
    norms: tuple[float, ...]


class AccumulationWindow:
    """Gathers a window's facts without reading the device, then shares them in one collective and one read.

    Args:
        modalities: The model's modalities in order.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        self._modalities = tuple(modalities)
        self._seen: set[str] = set()
        self._is_bad: Tensor | None = None

    def see(self, batches: Iterable[Mapping[str, object]]) -> None:
        """Notes the modalities of the batches to come; their keys are known on the host."""
        for batch in batches:
            pixel_values = batch.get("pixel_values")
            if isinstance(pixel_values, Mapping):
                self._seen.update(pixel_values)

    def add_loss(self, loss: Tensor) -> None:
        """Notes one micro-batch's loss, a 0-dim tensor on the device."""
        bad = ~loss.detach().isfinite()
        self._is_bad = bad if self._is_bad is None else self._is_bad | bad

    def close(self, *, is_stop_asked: bool = False, norms: Tensor | None = None) -> WindowFacts:
        """Ends the window: one all-reduce of a small vector and one device read.

        Args:
            is_stop_asked: Whether this rank was asked to stop.
            norms: This rank's share of the squared norms, shape (K,).

        Returns:
            The facts over all ranks.
        """
        assert self._is_bad is not None, "a window without a loss cannot be closed"
        host = [float(is_stop_asked), *(float(name in self._seen) for name in self._modalities)]
        facts = torch.cat(
            [
                self._is_bad.double().reshape(1),
                torch.tensor(host, dtype=torch.float64).to(self._is_bad.device, non_blocking=True),
                *([] if norms is None else [norms.to(self._is_bad.device)]),
            ]
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(facts)
        bad, stops, *values = facts.tolist()
        present = frozenset(name for name, count in zip(self._modalities, values, strict=False) if count > 0)
        self._seen.clear()
        self._is_bad = None
        return WindowFacts(
            is_finite=bad == 0,
            is_stop_asked=stops > 0,
            present=present,
            norms=tuple(values[len(self._modalities) :]),
        )
