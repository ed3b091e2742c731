"""Adafactor for parameters that FSDP2 shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import optimization

from umbrella_train.distributed.tensors import full, shard_like


class Adafactor(optimization.Adafactor):
    """Hugging Face's Adafactor, whose factored moments are means over rows and columns of whole matrices.

    A sharded parameter is gathered for its step, one at a time; its moments are unsharded on every rank. Other
    parameters are stepped as before.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a collective if parameters are sharded."""
        if not any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_whole(parameter, group)
        finally:
            self.param_groups = groups
        return loss

    def _step_whole(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        whole = nn.Parameter(full(parameter.detach()).clone())
        assert parameter.grad is not None
        whole.grad = full(parameter.grad)
        self.param_groups = [{**group, "params": [whole]}]
        # A resumed state may be sharded like its parameter.
        state = self.state.pop(parameter, {})
        self.state[whole] = {key: full(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        super().step()
        parameter.copy_(shard_like(whole.detach(), parameter))
        self.state[parameter] = self.state.pop(whole)
