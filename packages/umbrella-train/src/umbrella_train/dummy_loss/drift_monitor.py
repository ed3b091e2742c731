"""Measures how far the optimizer moves the patch embed of an absent modality, and warns if it is far."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.distributed.deepspeed import num_elements, whole_parameter
from umbrella_train.distributed.ranks import is_first_rank
from umbrella_train.distributed.tensors import full, local, shard_like

logger = logging.getLogger(__name__)

WARNING_LEVEL = 0.02
"""Drift that is warned of, in standard deviations of the patch embed's initial weights."""

WARNING_STEPS = 20
"""Shortest absence that is warned of: before, the momentum of real gradients moves the weights, dummy loss or not."""

DRIFT_NAME = "drift.safetensors"
"""File of a checkpoint with the copies of absent modalities."""


@dataclass(frozen=True)
class _Absence:
    """The parameters of an absent modality when it was last seen, and the number of steps until then."""

    since: int
    copies: Mapping[str, Tensor]


class DriftWatch:
    """Distance of each absent modality's trainable parameters from where they were when it was last seen.

    The parameters are copied before the first optimizer step without the modality and released at the first step with
    it: one copy per absent modality, on the parameters' device, sharded like them.

    Args:
        tower: The vision tower, before its first step.
        under_zero: Whether DeepSpeed steps partitions: copies are then unsharded, in float32, and each needs a
            collective.
    """

    def __init__(self, tower: UmbrellaVisionTower, *, under_zero: bool = False) -> None:
        self._under_zero = under_zero
        self._trainable: dict[str, dict[str, nn.Parameter]] = {}
        self._spread: dict[str, float] = {}
        self._absent: dict[str, _Absence] = {}
        self._warned: set[str] = set()
        for name in tower.modality_order:
            named = tower.patch_embed(name).named_parameters()
            trainable = {key: parameter for key, parameter in named if parameter.requires_grad}
            spread = _spread(full(self._values(parameter)) for parameter in trainable.values())
            if spread > 0:
                self._trainable[name] = trainable
                self._spread[name] = spread

    def before_step(self, present: frozenset[str], *, step: int) -> None:
        """Copies the parameters of modalities that were in the last step and are not in the next one.

        `present` are those that some rank saw in the window of the next step, `step` the steps taken so far.
        """
        for name, parameters in self._trainable.items():
            if name in present:
                self._absent.pop(name, None)
            elif name not in self._absent:
                copies = {key: self._values(parameter).clone() for key, parameter in parameters.items()}
                self._absent[name] = _Absence(step, copies)

    def measure(self, *, step: int) -> dict[str, float]:
        """Measures the drift after optimizer step `step`; a collective if parameters are sharded.

        Logs a warning, once per modality, if it exceeds `WARNING_LEVEL` after an absence of `WARNING_STEPS` or more.

        Returns:
            `drift/{modality}` of each modality with trainable parameters: their root mean square distance in standard
            deviations of its initial weights; 0 if the last step had it.
        """
        drift = dict.fromkeys(self._trainable, 0.0)
        absent = [name for name in self._trainable if name in self._absent]
        if absent:
            squares = torch.stack([self._squared_distance(name) for name in absent])
            if any(isinstance(each, DTensor) for name in absent for each in self._trainable[name].values()):
                dist.all_reduce(squares)
            for name, square in zip(absent, squares.tolist(), strict=True):
                count = sum(map(num_elements, self._trainable[name].values()))
                drift[name] = math.sqrt(square / count) / self._spread[name]
                num_steps = step - self._absent[name].since
                if drift[name] > WARNING_LEVEL and num_steps >= WARNING_STEPS and name not in self._warned:
                    self._warn(name, drift[name], num_steps=num_steps)
        return {f"drift/{name}": value for name, value in drift.items()}

    def _squared_distance(self, modality: str) -> Tensor:
        """The part of this rank's shards, 0-dim, float64."""
        norms = [
            torch.linalg.vector_norm(
                local(self._values(parameter)) - local(self._absent[modality].copies[key]), dtype=torch.float64
            )
            for key, parameter in self._trainable[modality].items()
        ]
        return torch.stack(norms).square().sum()

    def _values(self, parameter: nn.Parameter) -> Tensor:
        return whole_parameter(parameter) if self._under_zero else parameter.detach()

    def _warn(self, name: str, drift: float, *, num_steps: int) -> None:
        self._warned.add(name)
        if is_first_rank():
            logger.warning(
                "%s has been absent for %d steps, in which its patch embed moved by %.1f %% of its initial standard "
                "deviation. dummy_loss.absent: hold prevents this",
                name,
                num_steps,
                100 * drift,
            )

    def save(self, folder: Path, *, is_writer: bool = True) -> None:
        """Writes the state to a checkpoint, with unsharded copies; if sharded, every rank must call it."""
        tensors: dict[str, Tensor] = {}
        for name in self._trainable:
            for key, value in self._absent[name].copies.items() if name in self._absent else ():
                unsharded = full(value)
                if is_writer:
                    tensors[f"{name}/{key}"] = unsharded.to("cpu", copy=True).contiguous()
        if is_writer:
            state = {
                "spread": self._spread,
                "absent_since": {name: absence.since for name, absence in self._absent.items()},
                "warned": sorted(self._warned),
            }
            save_file(tensors, folder / DRIFT_NAME, metadata={"state": json.dumps(state)})

    def load(self, folder: Path) -> None:
        """Restores the state of a checkpoint: a resumed run measures what an unbroken one does."""
        path = folder / DRIFT_NAME
        if not path.is_file():
            if is_first_rank():
                logger.warning("%s: has no %s; drift is measured from its weights", folder.name, DRIFT_NAME)
            return
        with safe_open(path, framework="pt") as stored:
            state = json.loads(stored.metadata()["state"])
            # In the same order on every rank, for the collectives of DeepSpeed: the order of a set differs.
            for name in (name for name in self._trainable if name in state["absent_since"]):
                copies = {
                    key: shard_like(stored.get_tensor(f"{name}/{key}"), self._values(parameter))
                    for key, parameter in self._trainable[name].items()
                }
                self._absent[name] = _Absence(state["absent_since"][name], copies)
        self._spread.update(state["spread"])
        self._warned = set(state["warned"])


def _spread(values: Iterable[Tensor]) -> float:
    """Standard deviation of the largest tensor where it is not 0; 0 if there is none.

    This is the weight of the projection, or the first of its adapters (the second starts at zero).
    """
    for value in sorted(values, key=Tensor.numel, reverse=True):
        spread = float(value.float().std()) if value.numel() > 1 else 0.0
        if spread > 0:
            return spread
    return 0.0
