"""Optimizer, schedule and scaler of a checkpoint as safetensors and JSON: no pickle, one format for every engine.

Tensors are stored unsharded under the names of their parameters. A checkpoint of two sharded ranks can therefore be
resumed on three, or on one, and a parameter that was never stepped (`absent: hold`) has no entry.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from umbrella_train.distributed.tensors import full, shard_like
from umbrella_train.errors import RunError
from umbrella_train.hf_compat import set_last_rates

logger = logging.getLogger(__name__)

_MAX_NAMED = 8
TENSORS_NAME, STATE_NAME = "optimizer.safetensors", "training_state.json"


def save_training_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Any = None,
    layout: Mapping[str, Any] | None = None,
    is_writer: bool = True,
) -> None:
    """Writes the state; under a sharded engine every rank must call it, and one of them writes.

    Moments are gathered one parameter at a time. `layout` has the settings that determine the samples of a step (ranks,
    batch, accumulation, token budget, ...).
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in _stepped(model, optimizer):
        numbers[name] = {}
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                unsharded = full(value)
                if is_writer:
                    tensors[f"{name}/{key}"] = unsharded.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[name][key] = value
    if not is_writer:
        return
    state = {
        "optimizer": type(_unwrapped(optimizer)).__name__,
        "groups": _groups(model, optimizer),
        "numbers": numbers,
        "tensors": sorted(tensors),
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "layout": dict(layout or {}),
    }
    save_file(tensors, folder / TENSORS_NAME)
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1, default=Tensor.item), encoding="utf-8")


def load_training_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Any = None,
    layout: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
) -> None:
    """Restores a saved state, on any number of ranks; each reads from the file what its shards need.

    Settings of the optimizer and its schedule are those of this run's config. If they equal the checkpoint's, the
    resumed run is bit-identical; changed optimizer settings, another layout and a jump of the schedule are logged as
    warnings. `num_steps` are the optimizer steps of the checkpoint.

    Raises:
        RunError: The checkpoint has no such state, or that of another optimizer or of other parameters; a moment is
            missing, is not finite, or has another shape.
    """
    if not (folder / STATE_NAME).is_file() or not (folder / TENSORS_NAME).is_file():
        raise RunError(
            f"{folder}: has no {TENSORS_NAME} and {STATE_NAME}: a run cannot be resumed without its optimizer state"
        )
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    groups = _groups(model, optimizer)
    _check_optimizer(optimizer, state, groups=groups, folder=folder)
    before = state["layout"]
    if layout is not None and any(layout.get(key, value) != value for key, value in before.items()):
        logger.warning(
            "%s was written with %s and is resumed with %s: the position in the epoch is recomputed, so that some of "
            "its samples may occur twice and others not at all",
            folder.name,
            before,
            dict(layout),
        )
    _warn_of_changed_settings(groups, state["groups"], folder=folder)
    parameters = dict(model.named_parameters())
    settings = {name: group["settings"] for group in groups for name in group["parameters"]}
    optimizer.state.clear()
    with safe_open(folder / TENSORS_NAME, framework="pt") as stored:
        keys = set(stored.keys())
        problems = [f"{key}: is missing" for key in state.get("tensors", ()) if key not in keys]
        for key in sorted(keys):
            name, entry = key.rsplit("/", 1)
            if name not in parameters:
                problems.append(f"{key}: the model has no such parameter")
                continue
            parameter = parameters[name]
            value = stored.get_tensor(key)
            problems += _moment_problems(key, value, parameter, num_steps=num_steps)
            optimizer.state[parameter][entry] = _placed(
                value, entry=entry, parameter=parameter, settings=settings[name]
            )
    if problems:
        raise RunError("\n  ".join([f"{folder / TENSORS_NAME}: cannot be resumed from", *problems[:_MAX_NAMED]]))
    for name, values in state["numbers"].items():
        optimizer.state[parameters[name]].update(values)
    _resume_schedule(scheduler, state["scheduler"], groups=optimizer.param_groups, saved=state["groups"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])


def _moment_problems(key: str, value: Tensor, parameter: nn.Parameter, *, num_steps: int | None) -> list[str]:
    """Why a stored tensor cannot belong to its parameter: another shape, not finite, or more steps than the run had."""
    shape = tuple(parameter.shape)
    # Adafactor keeps means over rows and columns.
    shapes = {shape, (1,), ()} | ({shape[:-1], shape[:-2] + shape[-1:]} if len(shape) > 1 else set())
    problems = []
    if tuple(value.shape) not in shapes:
        problems.append(f"{key}: has shape {tuple(value.shape)}, and the parameter {shape}")
    if not bool(value.isfinite().all()):
        problems.append(f"{key}: is not finite")
    elif key.endswith("/step") and num_steps is not None and value.numel() == 1 and value.item() > num_steps:
        problems.append(f"{key}: counts {round(value.item())} steps, and the checkpoint is of step {num_steps}")
    return problems


def _warn_of_changed_settings(groups: list[dict[str, Any]], saved: list[dict[str, Any]], *, folder: Path) -> None:
    changed: dict[str, str] = {}
    for group, before in zip(groups, saved, strict=True):
        for key, value in before["settings"].items():
            now = group["settings"].get(key)
            if key != "lr" and _as_before(value, now) != now:  # lr is the schedule's at this step
                changed[{"initial_lr": "learning_rate"}.get(key, key)] = f"{now} (before: {value})"
    if changed:
        changes = ", ".join(f"{key} {values}" for key, values in changed.items())
        logger.warning("%s: the run resumes with %s", folder.name, changes)


def _resume_schedule(
    scheduler: Any, state: dict[str, Any], *, groups: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> None:
    """Sets the schedule to the checkpoint's step, for the learning rates of the config."""
    inner = getattr(scheduler, "scheduler", scheduler)  # of accelerate's wrapper
    scheduler.load_state_dict(state | {"base_lrs": inner.base_lrs} if "base_lrs" in state else state)
    if isinstance(inner, LambdaLR):
        rates = [
            base * function(inner.last_epoch) for base, function in zip(inner.base_lrs, inner.lr_lambdas, strict=True)
        ]
    else:
        rates = [_scaled(group, before["settings"]) for group, before in zip(groups, saved, strict=True)]
    changed = set()  # groups with one rate are reported once
    for group, rate, before in zip(groups, rates, saved, strict=True):
        group["lr"] = rate
        expected = _scaled(group, before["settings"])
        if not math.isclose(rate, expected, rel_tol=1e-6):
            changed.add((float(rate), expected))
    for rate, expected in sorted(changed):
        logger.warning("the schedule differs from before: the learning rate is %g instead of %g", rate, expected)
    set_last_rates(inner, rates)


def _scaled(group: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """The checkpoint's learning rate, scaled by the change of the initial one."""
    rate, start = float(before["lr"]), before.get("initial_lr")
    return rate if not start or start == group["initial_lr"] else rate * group["initial_lr"] / start


def _check_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, groups: list[dict[str, Any]], folder: Path
) -> None:
    """Rejects the state of another optimizer, or of other parameters."""
    kind = type(_unwrapped(optimizer)).__name__
    if state["optimizer"] != kind:
        raise RunError(f"{folder}: was written by {state['optimizer']}, and this run uses {kind}; set trainer.optim")
    saved_names = [group["parameters"] for group in state["groups"]]
    names = [group["parameters"] for group in groups]
    if saved_names != names:
        other = sorted({name for group in saved_names for name in group} ^ {name for group in names for name in group})
        raise RunError(
            f"{folder}: its optimizer has other parameters than this run's"
            + (f", among them {other[0]}" if other else ", in other groups")
            + "; resume with the config that it was trained with, or start a new run from its weights by "
            "model.pretrained"
        )


def _placed(value: Tensor, *, entry: str, parameter: nn.Parameter, settings: dict[str, Any]) -> Tensor:
    """A stored tensor as the optimizer expects it: sharded like its parameter, or on its device."""
    if entry == "step" and not (settings.get("fused") or settings.get("capturable")):
        # As in torch.optim: only fused and capturable optimizers keep their step counter on the device.
        return value
    return shard_like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with a state, in the model's order, which is the same on every rank."""
    stepped = {id(parameter) for parameter, state in optimizer.state.items() if state}
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in stepped)


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {
            "parameters": [names[id(parameter)] for parameter in group["params"]],
            "settings": {key: value for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _as_before(value: Any, current: Any) -> Any:
    """Restores the type of a setting: JSON has neither tuples nor tensors."""
    if isinstance(current, tuple):
        return tuple(value)
    return torch.tensor(value) if isinstance(current, Tensor) else value
