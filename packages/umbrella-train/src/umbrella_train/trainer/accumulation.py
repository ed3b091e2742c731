"""What ranks share once per optimizer step: finiteness, modalities seen, stop requests, gradient norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from umbrella_train.batches.collators import conversation_index, num_conversations


@dataclass(frozen=True)
class WindowFacts:
    """Facts about one accumulation window, the same on every rank.

    Attributes:
        is_loss_finite: Whether every loss on every rank was.
        is_gradient_finite: Whether every gradient that was checked was.
        is_stop_asked: Whether some rank received a signal to stop.
        present: Modalities that some rank saw.
        num_tokens: Supervised tokens of all samples.
        tokens_with: Supervised tokens of the samples with each modality present.
        norms: Squared gradient norms summed over ranks; empty unless requested.
    """

    is_loss_finite: bool
    is_gradient_finite: bool
    is_stop_asked: bool
    present: frozenset[str]
    num_tokens: int
    tokens_with: Mapping[str, int]
    norms: tuple[float, ...]


class AccumulationWindow:
    """Collects facts about a window without reading the device, then shares them in one collective and one read.

    Args:
        modalities: The model's modalities in order.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        self._modalities = tuple(modalities)
        self._is_bad: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._seen: set[str] = set()
        self._num_tokens = 0
        self._tokens_with = dict.fromkeys(self._modalities, 0)

    def see(self, batch: Mapping[str, object]) -> None:
        """Records modalities and supervised tokens of a batch that is still on the host."""
        pixel_values = batch.get("pixel_values")
        present = set(pixel_values) if isinstance(pixel_values, Mapping) else set()
        self._seen |= present
        labels, modality_ids = batch.get("labels"), batch.get("modality_ids")
        if not isinstance(labels, Tensor) or not isinstance(modality_ids, Tensor):
            return
        # The model shifts labels by one: the first position is not predicted.
        is_supervised = labels[:, 1:].ne(-100)
        self._num_tokens += int(is_supervised.sum())
        index = conversation_index(batch)
        tokens = index[:, 1:][is_supervised].bincount(minlength=num_conversations(batch))
        for tag, name in enumerate(self._modalities, start=1):
            if name in present:
                self._tokens_with[name] += int(tokens[index[modality_ids.eq(tag)].unique()].sum())

    def add_loss(self, loss: Tensor) -> None:
        """Records the loss of one micro-batch, a 0-dim tensor on the device."""
        bad = ~loss.detach().isfinite()
        self._is_bad = bad if self._is_bad is None else self._is_bad | bad

    def close(
        self, *, is_stop_asked: bool = False, has_bad_gradient: Tensor | None = None, norms: Tensor | None = None
    ) -> WindowFacts:
        """Ends the window: one all-reduce of a small vector and one device read.

        Args:
            is_stop_asked: Whether this rank received a signal to stop.
            has_bad_gradient: Whether a gradient of this rank is not finite, a 0-dim tensor on the device.
            norms: This rank's share of the squared norms, shape (K,).

        Returns:
            The facts over all ranks.
        """
        assert self._is_bad is not None, "a window without a loss cannot be closed"
        device = self._is_bad.device
        host = [float(is_stop_asked), float(self._num_tokens)]
        host += [float(name in self._seen) for name in self._modalities]
        host += [float(self._tokens_with[name]) for name in self._modalities]
        facts = torch.cat(
            [
                self._is_bad.double().reshape(1),
                (torch.zeros_like(self._is_bad) if has_bad_gradient is None else has_bad_gradient).double().reshape(1),
                torch.tensor(host, dtype=torch.float64).to(device, non_blocking=True),
                *([] if norms is None else [norms.to(device)]),
            ]
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(facts)
        bad_losses, bad_gradients, stops, num_tokens, *values = facts.tolist()
        count = len(self._modalities)
        seen = [name for name, times in zip(self._modalities, values[:count], strict=True) if times > 0]
        tokens = dict(zip(self._modalities, values[count : 2 * count], strict=True))
        self._is_bad = None
        self._forget()
        return WindowFacts(
            is_loss_finite=bad_losses == 0,
            is_gradient_finite=bad_gradients == 0,
            is_stop_asked=stops > 0,
            present=frozenset(seen),
            num_tokens=int(num_tokens),
            tokens_with={name: int(tokens[name]) for name in seen},
            norms=tuple(values[2 * count :]),
        )
