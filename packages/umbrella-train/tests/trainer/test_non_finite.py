"""A parameter or a loss that is not finite stops the run before the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

from umbrella_train.distributed.finite import NonFiniteError, has_bad_gradient

WEIGHT = "vision_tower.dMRI_patch_embed.proj.weight"


def weight_of(model: Any) -> torch.Tensor:
    return next(parameter for name, parameter in model.named_parameters() if name.endswith(WEIGHT))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.0}, {"absent": "hold"}], ids=str)
@pytest.mark.parametrize("kind", [("T1",), ("T1", "dMRI")], ids=["absent", "present"])
def test_non_finite_parameter_is_named_before_any_step(
    make_trainer: Callable[..., Any], value: float, settings: dict[str, Any], kind: tuple[str, ...]
) -> None:
    trainer = make_trainer([[kind, kind]] * 2, dummy_loss=settings, optim="adamw_torch", weight_decay=0.1)
    with torch.no_grad():
        weight_of(trainer.model).flatten()[3] = value
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=rf"step 1: parameter \S*{WEIGHT} is not finite"):
        trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert trainer.state.global_step == 0


def test_run_stops_in_the_window_of_the_non_finite_parameter(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer([[("T1",)]] * 4, gradient_accumulation_steps=2)
    train_step = trainer.training_step

    def spoil(model: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            with torch.no_grad():
                weight_of(model)[0] = math.inf
        return train_step(model, *args, **kwargs)

    trainer.training_step = spoil
    with pytest.raises(NonFiniteError, match="step 2: parameter"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_non_finite_loss_of_finite_parameters_is_reported(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer([[("T1",)]])
    collate = trainer.data_collator

    def spoil(examples: Any) -> dict[str, Any]:
        batch = collate(examples)
        batch["pixel_values"]["T1"].fill_(math.nan)
        return batch

    trainer.data_collator = spoil
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite"):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}], ids=str)
def test_non_finite_gradient_is_named_before_any_step(
    make_trainer: Callable[..., Any], settings: dict[str, Any]
) -> None:
    trainer = make_trainer([[("T1",)]] * 4, optim="adamw_torch", **settings)
    weight = weight_of(trainer.model)
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), math.inf))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=rf"step 1: the gradient of \S*{WEIGHT} is not finite"):
        trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_empty_shard_has_a_finite_gradient() -> None:
    model = torch.nn.ParameterList([torch.zeros(0), torch.zeros(2)])
    assert has_bad_gradient(model) is None
    model[0].grad = torch.zeros(0)
    assert not bool(has_bad_gradient(model))
    model[1].grad = torch.tensor([1.0, -math.inf])
    assert bool(has_bad_gradient(model))


@pytest.mark.parametrize(("size", "is_good"), [(1e15, True), (1e38, False)])
def test_large_gradients_pass_until_their_norm_overflows(
    make_trainer: Callable[..., Any], size: float, is_good: bool
) -> None:
    trainer = make_trainer([[("T1", "dMRI")]], max_grad_norm=1.0)
    weight_of(trainer.model).register_hook(lambda gradient: torch.full_like(gradient, size))
    if is_good:
        trainer.train()
        return
    with pytest.raises(NonFiniteError, match="step 1: the norm of all gradients is not finite"):
        trainer.train()


def test_non_finite_model_is_not_saved(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer([[("T1",)]] * 2, save_strategy="steps", save_steps=1)
    embeddings = trainer.model.get_input_embeddings().weight
    unused = next(word for word in range(len(embeddings)) if word not in trainer.train_dataset[0].input_ids)
    step = trainer.training_step

    def spoil(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            with torch.no_grad():
                embeddings[unused] = math.nan
        return step(*args, **kwargs)

    trainer.training_step = spoil
    # The token is in no sample: loss and gradients are finite.
    with pytest.raises(NonFiniteError, match=r"after step 2: parameter \S*embed_tokens.weight is not finite; nothing"):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    with pytest.raises(NonFiniteError):
        trainer.save_model(str(folder / "model"))
    assert not (folder / "model").exists()


ON_TWO_RANKS = """
import math
import torch
import torch.distributed as dist
from umbrella_train.distributed.finite import NonFiniteError, check_finite, describe_non_finite, has_bad_gradient
from umbrella_train.checkpoint.logged_loss import _mean_over_ranks
from umbrella_train.trainer.accumulation import AccumulationWindow
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.Linear(2, 3)
# Rank 0 has no gradient of the bias, as for a modality that it never saw.
model.weight.grad = torch.ones(3, 2)
model.bias.grad = torch.tensor([0.0, math.inf, 0.0]) if rank else None
window = AccumulationWindow(["T1"])
window.add_loss(torch.tensor(1.0))
facts = window.close(has_bad_gradient=has_bad_gradient(model))
print(facts.is_loss_finite, facts.is_gradient_finite)
print(describe_non_finite(model, step=4, is_loss_finite=facts.is_loss_finite))
with torch.no_grad():
    model.weight[1, 1] = math.nan if rank else 0.0
try:
    check_finite(model, step=4)
except NonFiniteError as error:
    print(error)
print(float(_mean_over_ranks(torch.tensor(2.0 + rank))))
dist.destroy_process_group()
"""


def test_all_ranks_report_what_one_rank_finds(tmp_path: Path) -> None:
    printed = [lines.splitlines() for lines in warm.output_of_ranks(ON_TWO_RANKS, folder=tmp_path)]
    assert printed[0] == printed[1]
    expected = ("True False", "step 4: the gradient of bias", "step 4: parameter weight", "2.5")
    assert all(words in line for words, line in zip(expected, printed[0], strict=True))
