"""Patch embeds turn volumes (3-D) and series (4-D) into tokens, and compute the dummy term of an absent modality."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import initialization as init

from umbrella_model.config import PatchEmbedConfig
from umbrella_model.positions import sincos_position_embedding


class PatchEmbed(nn.Module):
    """Divides volumes into patches and projects each to one token; subclasses define the number of axes.

    The projection is one matrix product over unfolded patches, equal to a convolution with kernel = stride and many
    times faster than `nn.Conv3d` in bfloat16. Its weight is the convolution's, flattened over (C, X, Y, Z[, T]).

    Args:
        config: Sizes of the modality.
        hidden_size: Width of a token.
    """

    num_axes: int

    def __init__(self, config: PatchEmbedConfig, *, hidden_size: int) -> None:
        super().__init__()
        if len(config.image_size) != self.num_axes:
            raise ValueError(f"{type(self).__name__} needs {self.num_axes} axes, image_size is {config.image_size}")
        self.config = config
        self.proj = nn.Linear(config.patch_elements, hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random filters of unit gain for normalised voxels (LeCun et al. 1998), sine-cosine positions, zero bias."""
        init.normal_(self.proj.weight, std=1.0 / math.sqrt(self.config.patch_elements))
        init.zeros_(self.proj.bias)
        table = sincos_position_embedding(self.config.grid_size, self.proj.out_features)
        init.copy_(self.position_embedding, table)

    def patchify(self, volumes: Tensor) -> Tensor:
        """Unfolds volumes into patches.

        Args:
            volumes: Shape (N, C, *image_size).

        Returns:
            Shape (N, num_patches, C * product of patch_size); the last axis of the grid varies fastest.

        Raises:
            ValueError: The shape is not that of the configuration.
        """
        expected = (self.config.in_channels, *self.config.image_size)
        if tuple(volumes.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"volumes have shape {tuple(volumes.shape)}, but this patch embed needs (N, {sizes})")
        folded = zip(self.config.grid_size, self.config.patch_size, strict=True)
        patches = volumes.reshape(*volumes.shape[:2], *chain.from_iterable(folded))
        grid_axes = range(2, 2 + 2 * self.num_axes, 2)
        patch_axes = range(3, 3 + 2 * self.num_axes, 2)
        patches = patches.permute(0, *grid_axes, 1, *patch_axes)
        return patches.reshape(volumes.shape[0], self.config.num_patches, self.config.patch_elements)

    def forward(self, volumes: Tensor | None) -> Tensor | None:
        """Tokens of the volumes, or the dummy term if there are none.

        Both are computed in `forward`, because a sharded engine gathers parameters when a module is called: the
        sequence of calls has to be the same for every batch.

        Args:
            volumes: Shape (N, C, *image_size), or None for an absent modality.

        Returns:
            Shape (N, num_patches, hidden_size); for an absent modality a 0-dim float32 tensor, or None if frozen.
        """
        if volumes is None:
            return self.dummy_term()
        patches = self.patchify(volumes.to(self.proj.weight.dtype))
        return self.proj(patches) + self.position_embedding

    def dummy_term(self) -> Tensor | None:
        """Sum of the trainable elements divided by the square root of their number N, in float32.

        Its gradient has an L2 norm of 1 for any N. None if all parameters are frozen.

        Raises:
            ValueError: The patch embed has adapters under DeepSpeed ZeRO-3.
        """
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            return None
        count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
        if is_sharded_by_zero(self):
            return self._sum_through_layers() / math.sqrt(count)
        # This order of summation makes gradients ready in the same order as a real batch, positions first. ZeRO-2 fills
        # its buckets in the order in which gradients become ready, and adds buckets up over ranks by position.
        ordered = [*self.proj.parameters(), self.position_embedding]
        sums = [parameter.sum(dtype=torch.float32) for parameter in ordered if parameter.requires_grad]
        return torch.stack(sums).sum() / math.sqrt(count)

    def _sum_through_layers(self) -> Tensor:
        """The sum of all elements, computed by calling the layers: ZeRO-3 gathers a layer's weights when it is called.

        Each weight is multiplied by 1, so that the gradients are those of the plain sum.
        """
        if type(self.proj) is not nn.Linear:
            raise ValueError(
                "DeepSpeed ZeRO-3 does not support adapters in a patch embed; use ZeRO-2, FSDP2 or DDP, or no adapters"
            )
        ones = torch.ones(1, self.config.patch_elements, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
        through_projection = self.proj(ones).sum(dtype=torch.float32)
        return through_projection + self.position_embedding.sum(dtype=torch.float32)


class VolumePatchEmbed(PatchEmbed):
    """Patch embed of 3-D volumes, (N, C, X, Y, Z) to (N, num_patches, hidden_size); Z varies fastest."""

    num_axes = 3


class SeriesPatchEmbed(PatchEmbed):
    """Patch embed of 4-D series, (N, C, X, Y, Z, T) to (N, num_patches, hidden_size); T varies fastest."""

    num_axes = 4


def build_patch_embed(config: PatchEmbedConfig, *, hidden_size: int) -> PatchEmbed:
    """Creates the patch embed of a modality."""
    patch_embed_class = SeriesPatchEmbed if config.is_series else VolumePatchEmbed
    return patch_embed_class(config, hidden_size=hidden_size)


def pool_tokens(tokens: Tensor, config: PatchEmbedConfig) -> Tensor:
    """Averages blocks of neighbouring tokens; without parameters, so that there are none to keep in the graph.

    Args:
        tokens: Shape (N, num_patches, hidden_size), the last axis of the grid fastest.
        config: Grid and pool sizes of the modality.

    Returns:
        Shape (N, num_tokens, hidden_size), in the same order.
    """
    if config.num_tokens == config.num_patches:
        return tokens
    blocks = [(grid // pool, pool) for grid, pool in zip(config.grid_size, config.pool_size, strict=True)]
    folded = tokens.reshape(len(tokens), *chain.from_iterable(blocks), tokens.shape[-1])
    return folded.mean(dim=tuple(range(2, 2 + 2 * len(blocks), 2))).flatten(1, -2)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is under FSDP2 or DeepSpeed ZeRO-3, whose all-gathers are matched over ranks by call order."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return True
    return is_sharded_by_zero(module)


def is_sharded_by_zero(module: nn.Module) -> bool:
    """Whether a module is under DeepSpeed ZeRO-3, where parameters are empty except during calls of their module."""
    # ZeRO-3 sets `ds_id` on every partitioned parameter.
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
