"""The state dict of a MONAI ViT as that of a Hugging Face ViT; MONAI itself is not needed."""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTConfig

from umbrella_model.inflate import PatchWeights

logger = logging.getLogger(__name__)

STATE_DICT_FILES = (".safetensors", ".pt", ".pth", ".ckpt")
# Every MONAI ViT has this key, and no other of the supported encoders does.
_POSITIONS = "patch_embedding.position_embeddings"
_FILTER_KEYS = {"conv": "patch_embedding.patch_embeddings", "perceptron": "patch_embedding.patch_embeddings.1"}
# Heads and decoders of classifiers and autoencoders, and the cross-attention of layers that have none in use.
_UNUSED = re.compile(
    r"(classification_head|conv3d_transpose\w*|decoder_\w+)\..+|decoder_pos_embedding|mask_tokens"
    r"|blocks\.\d+\.(norm_cross_attn|cross_attn)\..+"
    # Old versions of MONAI have one here, which they do not use.
    r"|patch_embedding\.cls_token"
)
# MaskedAutoEncoderViT has the final norm at the end of its blocks.
_NORM_IN_BLOCKS = re.compile(r"blocks\.\d+\.(weight|bias)")
_HEADS = "num_heads (vision_num_heads of from_parts and of a run's model section)"
_IMAGE_SIZE = "image_size to load_vision_encoder (model.vision_image_size of a run)"
_PATCH_SIZE = "patch_size to load_vision_encoder (model.vision_patch_size of a run)"
_LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.out_proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.linear1": "mlp.fc1",
    "mlp.linear2": "mlp.fc2",
}


@dataclass(frozen=True)
class VolumeViT:
    """A pretrained MONAI ViT.

    Attributes:
        tensors: Its used tensors, by MONAI's names.
        source: Path or class name, for messages.
        num_heads: Attention heads.
        patch_size: Of a perceptron patch embedding, as far as it is known.
    """

    tensors: Mapping[str, Tensor]
    source: str
    num_heads: int
    patch_size: tuple[int, ...] | None

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.tensors[_POSITIONS].shape[-1]

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len({key.split(".")[1] for key in self.tensors if key.startswith("blocks.")})

    def config(self, patches: PatchWeights) -> ViTConfig:
        """A Hugging Face config of the same architecture."""
        patch_size = list(patches.weight.shape[2:])
        # An entry that Hugging Face's ViT does not have; `adapt_encoder` reads it.
        options: dict[str, Any] = {"use_class_token": "cls_token" in self.tensors}
        return ViTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=len(self.tensors["blocks.0.mlp.linear1.weight"]),
            qkv_bias="blocks.0.attn.qkv.bias" in self.tensors,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            image_size=[grid * patch for grid, patch in zip(patches.grid_size, patch_size, strict=True)],
            patch_size=patch_size,
            num_channels=patches.weight.shape[1],
            **options,
        )

    def patches(self, *, image_size: Sequence[int] | None, patch_size: Sequence[int] | None) -> PatchWeights:
        """Patch filter and positions.

        Args:
            image_size: Voxels along each axis; None for a grid with the same number of patches along every axis.
            patch_size: Voxels of a patch of a perceptron patch embedding.

        Raises:
            ValueError: A size is missing, or does not fit the tensors.
        """
        kind = "conv" if f"{_FILTER_KEYS['conv']}.weight" in self.tensors else "perceptron"
        weight = self.tensors[f"{_FILTER_KEYS[kind]}.weight"]
        if kind == "perceptron":
            weight = self._unfold(weight, patch_size)
        elif patch_size is not None and tuple(patch_size) != tuple(weight.shape[2:]):
            raise ValueError(f"{self.source}: patch_size is {tuple(patch_size)}; the filter's is {weight.shape[2:]}")
        positions = self.tensors[_POSITIONS][0]
        grid = self._grid(len(positions), tuple(weight.shape[2:]), image_size)
        return PatchWeights(weight, self.tensors[f"{_FILTER_KEYS[kind]}.bias"], positions, grid)

    def _unfold(self, weight: Tensor, patch_size: Sequence[int] | None) -> Tensor:
        """The filter of shape (D, C, *patch) of a Linear over patches of (x, y, z, channel)."""
        width = weight.shape[1]
        side = round(width ** (1 / 3))
        patch = tuple(patch_size or self.patch_size or (side, side, side))
        if width % math.prod(patch) or (patch_size is None and self.patch_size is None and side**3 != width):
            raise ValueError(
                f"{self.source}: a patch has {width} values, not a multiple of the {math.prod(patch)} voxels of "
                f"{patch}; pass {_PATCH_SIZE}, the voxels of a patch along each axis"
            )
        return weight.unflatten(1, (*patch, width // math.prod(patch))).movedim(-1, 1)

    def _grid(self, count: int, patch: tuple[int, ...], image_size: Sequence[int] | None) -> tuple[int, ...]:
        if image_size is None:
            side = round(count ** (1 / len(patch)))
            grid = (side,) * len(patch)
            advice = f"pass {_IMAGE_SIZE}, the voxels along each axis that it was trained on"
        elif len(image_size) == len(patch):
            grid = tuple(size // step for size, step in zip(image_size, patch, strict=True))
            advice = f"image_size {tuple(image_size)} with patches of {patch} gives {math.prod(grid)}"
        else:
            raise ValueError(f"{self.source}: image_size {tuple(image_size)} must have {len(patch)} axes")
        if math.prod(grid) != count:
            raise ValueError(f"{self.source}: the {count} positions are not a grid of {grid} patches; {advice}")
        return grid

    def hugging_face_state(self, *, layers: str) -> dict[str, Tensor]:
        """The state dict of a Hugging Face ViT on patch tokens.

        Args:
            layers: Name of its list of layers.
        """
        state: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            if key.startswith("norm."):
                state[f"layernorm.{key.removeprefix('norm.')}"] = tensor
            elif key == "cls_token":
                state["embeddings.special_tokens"] = tensor[0]
            elif key.startswith("blocks."):
                _, number, rest = key.split(".", 2)
                name, _, kind = rest.rpartition(".")
                if name == "attn.qkv":
                    for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                        state[f"{layers}.{number}.attention.{part}_proj.{kind}"] = rows
                else:
                    state[f"{layers}.{number}.{_LAYER_NAMES[name]}.{kind}"] = tensor
        return state


def read_state_dict(path: Path) -> dict[str, Any]:
    """Reads a file of tensors; pickled objects are rejected, since loading them would run their code.

    Raises:
        ValueError: The file has another ending, or is not a state dict.
    """
    if path.suffix not in STATE_DICT_FILES:
        raise ValueError(f"{path}: the file must end in {', '.join(STATE_DICT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it cannot be opened
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} has a {type(content).__name__}, not a state dict")
    return dict(content)


def _unreadable(path: Path, error: Exception) -> str:
    other = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
    if other is not None:
        return (
            f"{path}: has objects of {other[1]}, which could run code when loaded; if you trust the file, save the "
            "state dict alone, as from a checkpoint of Lightning: torch.save(torch.load(path, weights_only=False)"
            "['state_dict'], new_path)"
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"{path}: not a file of tensors alone, or incomplete ({reason}); copy it again, or save the state dict: "
        "torch.save(model.state_dict(), path)"
    )


def find_volume_vit(
    content: Mapping[str, Any], *, source: str, num_heads: int | None, module: nn.Module | None = None
) -> VolumeViT | None:
    """The MONAI ViT in a state dict, also inside of other modules or next to other entries; None if there is none.

    Args:
        content: A state dict, or a checkpoint with state dicts as entries.
        source: Path or class name, for messages.
        num_heads: Attention heads; None for those of `module`.
        module: The module that the state dict is of.

    Raises:
        ValueError: There are several, keys are unknown or missing (all are listed), or `num_heads` is not known.
    """
    flat = dict(_flatten(content))
    prefixes = sorted({key.removesuffix(_POSITIONS) for key in flat if key.endswith(_POSITIONS)})
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise ValueError(f"{source} has several encoders: {', '.join(prefixes)}; save the one to load on its own")
    prefix = prefixes[0]
    inside = {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}
    unused = {key for key in inside if _UNUSED.fullmatch(key)}
    tensors = {
        f"norm.{norm[1]}" if (norm := _NORM_IN_BLOCKS.fullmatch(key)) else key: tensor
        for key, tensor in inside.items()
        if key not in unused
    }
    _check_keys(tensors, source=source)
    # Entries next to the state dict, such as the optimizer's, are not part of a model.
    top = prefix.partition(".")[0]
    outside = {key for key in flat if not key.startswith(prefix) and (key.startswith(top) or top not in content)}
    dropped = sorted({prefix + key for key in unused} | outside)
    if dropped:
        logger.info("%s: %d tensors outside the encoder not used (%s)", source, len(dropped), ", ".join(dropped))
    vit: Any = None if module is None else module.get_submodule(prefix.removesuffix("."))
    width = tensors[_POSITIONS].shape[-1]
    heads = num_heads if vit is None else vit.blocks[0].attn.num_heads
    if heads is None:
        raise ValueError(f"{source}: a state dict does not have the number of attention heads; pass {_HEADS}")
    if num_heads not in (None, heads):
        raise ValueError(f"{source}: it has {heads} attention heads, not {num_heads}; leave out {_HEADS}")
    if heads < 1 or width % heads:
        raise ValueError(f"{source}: {heads} attention heads do not divide the hidden size {width}; change {_HEADS}")
    return VolumeViT(tensors, source, heads, None if vit is None else _perceptron_patch(vit))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


def _check_keys(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Compares the keys with those of a ViT of the same number of blocks."""
    numbers = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}
    expected = {_POSITIONS, "norm.weight", "norm.bias"}
    filters = _FILTER_KEYS["perceptron" if f"{_FILTER_KEYS['perceptron']}.weight" in tensors else "conv"]
    expected |= {f"{filters}.weight", f"{filters}.bias"}
    kinds = [f"{name}.{kind}" for name in _LAYER_NAMES for kind in ("weight", "bias")] + ["attn.qkv.weight"]
    if any(key.endswith("attn.qkv.bias") for key in tensors):
        kinds.append("attn.qkv.bias")
    expected |= {f"blocks.{number}.{kind}" for number in range(max(numbers, default=0) + 1) for kind in kinds}
    lines = [
        *(f"  missing: {key}" for key in sorted(expected - tensors.keys())),
        *(f"  unknown: {key}" for key in sorted(tensors.keys() - expected - {"cls_token"})),
    ]
    if lines:
        raise ValueError(f"{source}: {len(lines)} keys are not those of a MONAI ViT:\n" + "\n".join(lines))


def _perceptron_patch(vit: Any) -> tuple[int, ...] | None:
    """Patch size of a perceptron patch embedding, which rearranges (p1 p2 p3 c)."""
    first = next(vit.patch_embedding.patch_embeddings.children(), None)
    sizes = dict(getattr(first, "axes_lengths", {}))
    return tuple(int(sizes[key]) for key in sorted(sizes)) or None
