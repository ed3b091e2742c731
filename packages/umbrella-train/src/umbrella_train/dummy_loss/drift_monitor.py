"""Warns when the dummy gradient has moved an absent modality's patch embed noticeably."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch.distributed as dist
from torch import nn

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.distributed.deepspeed import num_elements
from umbrella_train.distributed.tensors import local_elements
from umbrella_train.dummy_loss.drift import DriftForecast, OptimizerFacts, Rule
from umbrella_train.dummy_loss.loss import DummyLoss

logger = logging.getLogger(__name__)

WARNING_LEVEL = 0.02
"""Drift that is warned of, in standard deviations of the patch embed's initial weights."""

_MOST_PENDING = 1000
"""Most steps between two updates of the forecast."""

_RULES: Mapping[str, Rule] = {"AdamW": "adam", "Adam": "adam", "SGD": "sgd", "Adafactor": "adafactor"}


class DriftWatch:
    """Forecasts for all modalities, computed on the host.

    Args:
        tower: The vision tower, before its first step.
        optimizer: Its optimizer; there is no forecast except for Adam, AdamW, SGD and Adafactor.
        dummy_loss: Gives the norm of each modality's dummy gradient.
        groups: Number of the optimizer's group of each parameter, from `number_groups`. DeepSpeed, which steps flat
            partitions, keeps the groups and their order, but not the parameters in them.
    """

    def __init__(
        self,
        tower: UmbrellaVisionTower,
        *,
        optimizer: Any,
        dummy_loss: DummyLoss,
        groups: Mapping[int, int] | None = None,
    ) -> None:
        groups = number_groups(optimizer) if groups is None else groups
        rule = _rule_of(optimizer)
        self._forecasts: dict[str, DriftForecast] = {}
        self._spread: dict[str, float] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._norms: dict[str, float] = {}
        self._warned: set[str] = set()
        self._pending: list[tuple[frozenset[str], dict[str, float]]] = []
        self._clip = 1.0
        if rule is None:
            return
        for name in tower.modality_order:
            trainable = [parameter for parameter in tower.patch_embed(name).parameters() if parameter.requires_grad]
            if not trainable:
                continue
            group = optimizer.param_groups[groups[id(trainable[0])]]
            beta1, beta2 = group.get("betas", (group.get("momentum", 0.0), 0.0))
            facts = OptimizerFacts(rule, beta1, beta2, group.get("eps", 0.0))
            self._forecasts[name] = DriftForecast(
                num_elements=sum(map(num_elements, trainable)),
                gradient_norm=dummy_loss.weight(name),
                optimizer=facts,
            )
            self._spread[name] = _spread(trainable)
            self._groups[name] = group

    def step(self, present: frozenset[str]) -> None:
        """Records one optimizer step with the modalities that some rank saw in its window.

        It is evaluated at the next logging step, when the size of the gradients and the clipping factor are known.
        """
        rates = {name: float(group["lr"]) for name, group in self._groups.items()}
        self._pending.append((present, rates))
        if len(self._pending) >= _MOST_PENDING:
            self._follow()

    def learn(self, norms: Mapping[str, float], *, clip: float = 1.0) -> None:
        """Evaluates the recorded steps with the gradient sizes of a logging step.

        Args:
            norms: L2 norm of the gradient of each modality that was present, before clipping.
            clip: Factor of gradient clipping.
        """
        self._norms.update(norms)
        self._clip = clip
        self._follow()

    def _follow(self) -> None:
        # A modality without a logged gradient gets the size of the others; before the first one, 0.01 is typical.
        usual = fmean(self._norms.values()) if self._norms else 0.01
        for present, rates in self._pending:
            for name, forecast in self._forecasts.items():
                norm = self._norms.get(name, usual) if name in present else None
                forecast.step(learning_rate=rates[name], real_norm=norm, clip=self._clip)
                if name not in self._warned and self.drift(name) > WARNING_LEVEL:
                    self._warn(name, forecast.steps_absent)
        self._pending.clear()

    def _warn(self, name: str, steps_absent: int) -> None:
        self._warned.add(name)
        if dist.is_initialized() and dist.get_rank():
            return  # the first rank warns
        logger.warning(
            "%s was absent for %s; by forecast the dummy loss has moved its patch embed by %.1f %% of its initial "
            "standard deviation. dummy_loss.absent: hold prevents this",
            name,
            "1 step" if steps_absent == 1 else f"{steps_absent} steps",
            100 * self.drift(name),
        )

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: a resumed run continues, relative to the initial weights of the first start."""
        self._follow()
        return {
            "forecasts": {name: forecast.state_dict() for name, forecast in self._forecasts.items()},
            "spread": self._spread,
            "norms": self._norms,
            "warned": sorted(self._warned),
            "clip": self._clip,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        for name, forecast in self._forecasts.items():
            if name in state["forecasts"]:
                forecast.load_state_dict(state["forecasts"][name])
                self._spread[name] = state["spread"][name]
        self._norms = dict(state["norms"])
        self._warned = set(state["warned"])
        self._clip = float(state["clip"])

    def drift(self, modality: str) -> float:
        """Drift since the modality was last seen, in standard deviations of its initial weights."""
        return self._forecasts[modality].since_seen / self._spread[modality]

    def as_log(self) -> dict[str, float]:
        """`drift/{modality}` of each modality with a forecast."""
        return {f"drift/{name}": self.drift(name) for name in self._forecasts}


def number_groups(optimizer: Any) -> dict[int, int]:
    """The number of the group that each parameter is in, by the parameter's `id`."""
    return {
        id(parameter): number for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
    }


def _rule_of(optimizer: Any) -> Rule | None:
    # accelerate wraps the optimizer, DeepSpeed wraps it once more.
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return _RULES.get(type(optimizer).__name__)


def _spread(parameters: list[nn.Parameter]) -> float:
    """Standard deviation of the largest tensor where it is not 0; of this rank's shard if it is sharded.

    This is the weight of the projection, or the first of its adapters (the second starts at zero).
    """
    for parameter in sorted(parameters, key=num_elements, reverse=True):
        shard = local_elements(parameter)
        spread = float(shard.float().std()) if shard.numel() > 1 else 0.0
        if spread > 0:
            return spread
    return 1.0
