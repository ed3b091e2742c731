"""Gradient norms of each modality's patch embed, for the log and the parity of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.zero import whole_gradient


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PatchEmbedGradients:
    """Squared gradient norms of all patch embeds in one fused call and without a device sync.

    Args:
        tower: The model's vision tower.
        under_zero: Whether DeepSpeed holds the gradients: each norm then costs a collective of its own.
    """

    def __init__(self, tower: UmbrellaVisionTower, *, under_zero: bool = False) -> None:
        self._tower = tower
        self._under_zero = under_zero
        self.modalities: Sequence[str] = tower.modality_order

    def keys(self, modality: str, *, is_active: bool) -> tuple[str, str]:
        """Log keys of a modality: its whole patch embed, and the projection alone."""
        label = modality if is_active else "inactive"
        name = f"grad/[{label}]/vision_tower.{modality}_patch_embed"
        return name, f"{name}.proj"

    def squared_norms(self) -> Tensor:
        """Squared norms on this rank, shape (2 * number of modalities,), float64: (patch embed, projection) pairs.

        Of a sharded gradient this is the local shard's share; the shares of all ranks add up.
        """
        gradients, whole, projection = [], [], []
        for index, modality in enumerate(self.modalities):
            for name, parameter in self._tower.patch_embed(modality).named_parameters():
                gradient = whole_gradient(parameter) if self._under_zero else parameter.grad
                if gradient is None:
                    continue
                gradients.append(local(gradient))
                whole.append(2 * index)
                projection.append(2 * index + 1 if name.startswith("proj.") else -1)
        device = next(self._tower.parameters()).device
        sums = torch.zeros(2 * len(self.modalities), dtype=torch.float64, device=device)
        if not gradients:
            return sums
        is_double = any(gradient.dtype == torch.float64 for gradient in gradients)
        dtype = torch.float64 if is_double else torch.float32
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).double().square()
        sums.index_add_(0, torch.tensor(whole, device=device), squares)
        is_projection = torch.tensor([index >= 0 for index in projection], device=device)
        sums.index_add_(0, torch.tensor(projection, device=device).clamp_min(0), squares * is_projection)
        return sums

    @property
    def is_sharded(self) -> bool:
        """Whether the gradients are shards, so that each rank holds a share of every norm."""
        return any(isinstance(parameter, DTensor) for parameter in self._tower.parameters())

    def clear(self, modalities: Sequence[str]) -> None:
        """Takes the gradients of modalities away, so that the optimiser leaves parameters and moments untouched."""
        for modality in modalities:
            for parameter in self._tower.patch_embed(modality).parameters():
                parameter.grad = None

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiplies the gradients of each modality by its factor."""
        for modality, factor in factors.items():
            parameters = self._tower.patch_embed(modality).parameters()
            gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            if gradients and factor != 1:
                torch._foreach_mul_(gradients, factor)
