"""Breaks one rule of the dummy loss, to show that a check detects it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.trainer.trainer import UmbrellaTrainer


def break_call_order(trainer: UmbrellaTrainer) -> None:
    """Calls the patch embeds in another order on odd ranks: absent ones last."""
    tower = _tower(trainer)
    if trainer.args.process_index % 2:
        tower.modality_order = tuple(reversed(tower.modality_order))


def compute_outside_forward(trainer: UmbrellaTrainer) -> None:
    """Adds the terms in the trainer, from parameters that the wrapped forward did not use."""
    tower, forward = _tower(trainer), UmbrellaVisionTower.forward

    def without_terms(*args: Any, **kwargs: Any) -> Any:
        output = forward(tower, *args, **kwargs)
        output.dummy_terms = {}
        return output

    tower.forward = without_terms
    compute = trainer.compute_loss

    def with_terms(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name in tower.modality_order:
            if name not in inputs["pixel_values"]:
                loss = loss + 1e-7 * sum(parameter.sum() for parameter in tower.patch_embed(name).parameters())
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = with_terms


def go_around_the_wrapper(trainer: UmbrellaTrainer) -> None:
    """Computes the loss on `model.module`: DDP then reduces nothing, without an error."""
    compute = trainer.compute_loss

    def unwrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(getattr(model, "module", model), *args, **kwargs)

    trainer.compute_loss = unwrapped


def forget_the_window(trainer: UmbrellaTrainer) -> None:
    """Lets `hold` use only the last micro-batch."""
    window, see = trainer._window, trainer._window.see

    def see_alone(batch: Any) -> None:
        window._seen.clear()
        see(batch)

    window.see = see_alone


def sum_in_another_order(trainer: UmbrellaTrainer) -> None:
    """Sums positions before the projection, so that the order of gradients differs from that of a real batch."""

    def dummy_term(embed: Any) -> Any:
        parameters = [embed.position_embedding, *embed.proj.parameters()]
        total = torch.stack([parameter.sum() for parameter in parameters]).sum()
        return total / sum(parameter.numel() for parameter in parameters) ** 0.5

    tower = _tower(trainer)
    for name in tower.modality_order:
        embed = tower.patch_embed(name)
        embed.dummy_term = partial(dummy_term, embed)


def plant_infinity(trainer: UmbrellaTrainer) -> None:
    """Sets one weight of the patch embed that is always absent (schedule `absent`) to infinity."""
    with torch.no_grad():
        next(_tower(trainer).patch_embed("dMRI").parameters()).view(-1)[0] = float("inf")


def spoil_scans(trainer: UmbrellaTrainer) -> None:
    """Sets the scans of one sample to NaN: the first of the second step on the last rank."""
    get = trainer.get_batch_samples

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        batches, num_items = get(*args, **kwargs)
        if trainer.state.global_step == 1 and trainer.args.process_index == trainer.args.world_size - 1:
            for voxels in batches[0]["pixel_values"].values():
                voxels[0] = float("nan")
        return batches, num_items

    trainer.get_batch_samples = spoiled


SABOTAGES: dict[str, Callable[[UmbrellaTrainer], None]] = {
    "order": break_call_order,
    "outside": compute_outside_forward,
    "around": go_around_the_wrapper,
    "window": forget_the_window,
    "infinity": plant_infinity,
    "summed": sum_in_another_order,
    "nan": spoil_scans,
}


def _tower(trainer: UmbrellaTrainer) -> Any:
    return next(module for module in trainer.model.modules() if isinstance(module, UmbrellaVisionTower))
