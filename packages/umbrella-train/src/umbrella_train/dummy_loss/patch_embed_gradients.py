"""Gradients of each modality's patch embed: norms for the log, clearing those of absent modalities, scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.distributed.deepspeed import whole_gradient
from umbrella_train.distributed.tensors import local
from umbrella_train.hf_compat import multiply, vector_norms


class PatchEmbedGradients:
    """Squared gradient norms of all patch embeds in one fused call and without a device sync.

    Args:
        tower: The model's vision tower.
        under_zero: Whether gradients are in DeepSpeed's partitions: each norm then needs a collective.
    """

    def __init__(self, tower: UmbrellaVisionTower, *, under_zero: bool = False) -> None:
        self._tower = tower
        self._under_zero = under_zero
        self.modalities: Sequence[str] = tower.modality_order

    def keys(self, modality: str, *, is_active: bool) -> tuple[str, str]:
        """Log keys of a modality: for its whole patch embed, and for the projection."""
        label = modality if is_active else "inactive"
        name = f"grad/[{label}]/vision_tower.{modality}_patch_embed"
        return name, f"{name}.proj"

    def squared_norms(self) -> Tensor:
        """Squared gradient norms on this rank, one per parameter of the patch embeds, float64; for `add_up`.

        For a sharded gradient this is the local shard's part; the sum over ranks is the whole. Zero if a parameter has
        no gradient.
        """
        gradients: list[Tensor] = []
        places: list[int] = []
        parameters = [parameter for _, _, parameter in self._named()]
        for place, parameter in enumerate(parameters):
            gradient = whole_gradient(parameter) if self._under_zero else parameter.grad
            if gradient is not None:
                gradients.append(local(gradient))
                places.append(place)
        squares = [torch.zeros((), dtype=torch.float64, device=parameters[0].device)] * len(parameters)
        if gradients:
            is_double = any(gradient.dtype == torch.float64 for gradient in gradients)
            norms = vector_norms(gradients, dtype=torch.float64 if is_double else torch.float32)
            for place, norm in zip(places, norms, strict=True):
                squares[place] = norm.double().square()
        return torch.stack(squares)

    def add_up(self, squares: Sequence[float]) -> list[float]:
        """Sums the numbers of `squared_norms` to (patch embed, projection) of each modality."""
        sums = [0.0] * (2 * len(self.modalities))
        if not squares:
            return sums
        for (index, name, _), square in zip(self._named(), squares, strict=True):
            sums[2 * index] += square
            sums[2 * index + 1] += square if name.startswith("proj.") else 0.0
        return sums

    def _named(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        for index, modality in enumerate(self.modalities):
            for name, parameter in self._tower.patch_embed(modality).named_parameters():
                yield index, name, parameter

    @property
    def is_sharded(self) -> bool:
        """Whether the gradients are sharded, so that each rank has a part of every norm."""
        return any(isinstance(parameter, DTensor) for parameter in self._tower.parameters())

    def clear(self, modalities: Sequence[str]) -> None:
        """Clears the gradients of modalities, so that the optimizer does not change their parameters and moments."""
        for modality in modalities:
            for parameter in self._tower.patch_embed(modality).parameters():
                parameter.grad = None

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiplies the gradients of each modality by its factor."""
        for modality, factor in factors.items():
            parameters = self._tower.patch_embed(modality).parameters()
            gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            if gradients and factor != 1:
                multiply(gradients, factor)
