"""FSDP2: parameters, gradients and moments sharded over all ranks, applied by the trainer on any device.

On a CPU, accelerate silently uses DDP when FSDP2 is requested. This code is the same on CPU and GPU, so that tests on
two gloo ranks cover what runs on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.distributed.deepspeed import is_partitioned
from umbrella_train.distributed.tensors import full, local, shard_like
from umbrella_train.errors import RunError

LAYER_LISTS = ("layers", "layer", "blocks", "h")


def shard_model(model: nn.Module, *, device: torch.device) -> None:
    """Shards a model in place over all ranks.

    A unit is gathered for its forward and again for its backward; every rank must call the same units in the same
    order. Units are each patch embed, each layer of the encoder and of the language model, and the rest.

    Args:
        model: An UMBRELLA model with equal weights on every rank, on its device.
        device: Its device.

    Raises:
        RunError: There is no process group.
    """
    if not dist.is_initialized():
        raise RunError("trainer.engine: fsdp2 shards over ranks; start it with torchrun or accelerate launch")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in sharding_units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def sharding_units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered separately: patch embeds, and the members of every list of layers."""
    for module in model.modules():
        if isinstance(module, UmbrellaVisionTower):
            yield from (module.patch_embed(name) for name in module.modality_order)
    yield from transformer_layers(model)


def transformer_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of the vision encoder and of the language model.

    Hugging Face's DINOv2 calls its list `layer`, GPT-2 and its relatives `h`, MPT and modules of one's own
    `blocks`. Lists inside of a layer are part of it.
    """
    found = ""
    for name, module in model.named_modules():
        is_inside = found and name.startswith(f"{found}.")
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS and not is_inside:
            found = name
            yield from module


def is_sharded_model(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 shards any parameter over the ranks."""
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def whole_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The unsharded state dict on the CPU, on the ranks that `keep` it; a collective that every rank must call."""
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        unsharded = full(tensor)
        if keep:
            whole[name] = unsharded.detach().to("cpu")
    return whole


def load_whole_state(model: nn.Module, files: list[Path]) -> None:
    """Loads unsharded safetensors into a sharded model; every rank reads what it needs.

    Raises:
        RunError: Keys or shapes of the files differ from those of the model.
    """
    expected: dict[str, Any] = dict(model.state_dict())
    found: set[str] = set()
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - the handle is no mapping
                    if name not in expected:
                        raise RunError(f"{file}: has {name}, which the model does not have")
                    value = stored.get_tensor(name)
                    if value.shape != expected[name].shape:
                        raise RunError(
                            f"{file}: {name} has the shape {tuple(value.shape)}, and the model's "
                            f"{tuple(expected[name].shape)}; resume with the config that it was trained with"
                        )
                    expected[name].copy_(shard_like(value, expected[name]))
                    found.add(name)
    # A tied weight is stored once, under the first of its names.
    loaded = {_address(expected[name]) for name in found}
    missing = [name for name, tensor in expected.items() if name not in found and _address(tensor) not in loaded]
    if missing:
        raise RunError(f"{files[0].parent}: lacks {len(missing)} tensors of the model, the first is {missing[0]}")


def _address(tensor: Tensor) -> int:
    return local(tensor).data_ptr()
