"""The samples of a loss or gradient that is not finite are named, and such a step can be skipped."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from umbrella_data.batch.example import SampleOrigin
from umbrella_data.privacy import who_is
from umbrella_train.batches.collators import NamedCollator, SupervisedCollator
from umbrella_train.config import RunConfig
from umbrella_train.distributed.finite import NonFiniteError
from umbrella_train.errors import RunError
from umbrella_train.run import training as run
from umbrella_train.run_folder import RunFolder
from umbrella_train.trainer.non_finite import LIST_NAME, describe_samples, sample_losses

MakeTrainer = Callable[..., Any]
T1 = [("T1",), ("T1",)]


def spoil(trainer: Any, indices: Collection[int]) -> None:
    """Voxels of the T1 of these samples become NaN, in training and evaluation."""
    collate = trainer.data_collator

    def with_nan(examples: Any) -> Any:
        batch = collate(examples)
        for place, example in enumerate(examples):
            if example.index in indices:
                batch["pixel_values"]["T1"][place, ..., 0] = math.nan
        return batch

    trainer.data_collator = with_nan


def state_of(trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters and moments."""
    state = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        entries = trainer.optimizer.state.get(parameter, {})
        state |= {f"{name}/{key}": value.clone() for key, value in entries.items() if isinstance(value, Tensor)}
    return state


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def states_after_steps(trainer: Any) -> list[dict[str, Tensor]]:
    """Trains, and returns the state before the first step and after each."""
    states: list[dict[str, Tensor]] = []
    log = trainer.non_finite.on_step_end

    def keep(*args: Any, **kwargs: Any) -> None:
        states.append(state_of(trainer))
        log(*args, **kwargs)

    trainer.non_finite.on_step_end = keep
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    return [before, *states]


def named_in(message: str) -> list[str]:
    """The names at the end of a message, without their losses."""
    return re.findall(r"^    (.*): loss ", message, flags=re.MULTILINE)


# ---- naming ----


@pytest.mark.parametrize("packing", [False, True])
def test_losses_of_samples_are_the_parts_of_the_loss_of_the_batch(
    make_trainer: MakeTrainer, make_model: Any, make_example: Any, packing: bool
) -> None:
    model = make_model()
    model.set_attn_implementation("varlen")
    trainer = make_trainer(model=model, packing=packing)
    kinds = [("T1",), ("rsfMRI", "T1"), (), ("dMRI",)]
    examples = [make_example(kind, index) for index, kind in enumerate(kinds)]
    batch = trainer.data_collator(examples)
    losses = sample_losses(model, batch, dict(batch))
    alone = [model(**trainer.data_collator([example])).loss.item() for example in examples]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert batch.samples == ("sample 0", "sample 1", "sample 2", "sample 3")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_samples_with_a_non_finite_loss_are_named(
    make_trainer: MakeTrainer, make_model: Any, packing: bool, accumulation: int
) -> None:
    model = make_model()
    model.set_attn_implementation("varlen")
    batches = [[("T1",), ("T1", "dMRI")], [("T1",), ()], [("T1",), ("T1",), ()], [("T1",)]]
    trainer = make_trainer(batches, model=model, packing=packing, gradient_accumulation_steps=accumulation)
    spoil(trainer, {5})
    with pytest.raises(NonFiniteError, match=r"step \d: the loss is not finite") as raised:
        trainer.train()
    assert named_in(str(raised.value)) == ["sample 5"]
    assert f"1 of {3 if accumulation == 1 else 4} samples" in str(raised.value)


def test_all_samples_are_candidates_if_a_gradient_overflows(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([T1, T1], gradient_accumulation_steps=2)
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(NonFiniteError, match="step 1: the gradient of") as raised:
        trainer.train()
    assert named_in(str(raised.value)) == ["sample 0", "sample 1", "sample 2", "sample 3"]
    assert "not finite:" not in str(raised.value)


def test_losses_are_computed_once_and_only_for_a_step_that_is_not_finite(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([T1] * 4, on_non_finite="skip", gradient_accumulation_steps=2)
    forwards: list[bool] = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    spoil(trainer, {2})
    trainer.train()
    assert forwards == [True, True, False, False, True, True]
    assert trainer.non_finite._batches == ()


def test_losses_have_the_dropout_of_the_step_and_leave_the_random_state(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([[("T1",)]], on_non_finite="skip")
    for layer in trainer.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    next(trainer.model.parameters()).register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    seen: list[Any] = []
    handle, keep = trainer.non_finite.handle, trainer.non_finite._list

    def watched(**options: Any) -> None:
        loss, state = trainer._task_loss.item(), torch.get_rng_state()
        handle(**options)
        seen.extend([loss, torch.equal(torch.get_rng_state(), state)])

    def listed(samples: Any, **options: Any) -> None:
        seen.append([loss for _, loss in samples])
        keep(samples, **options)

    trainer.non_finite.handle, trainer.non_finite._list = watched, listed
    trainer.train()
    (again,), loss, is_same_state = seen
    assert again == pytest.approx(loss, rel=1e-6)
    assert is_same_state


def test_batch_of_the_loader_keeps_its_names_and_the_model_does_not_get_them(
    make_trainer: MakeTrainer, make_example: Any, collate: Any
) -> None:
    origin = SampleOrigin("train.jsonl", line=3, subject="sub-1")
    example = make_example(("T1",), 0)
    object.__setattr__(example, "origin", origin)
    batch = NamedCollator(collate)([example])
    assert batch.samples == (origin,)
    assert str(origin) == "train.jsonl, line 3, subject sub-1"
    # As from a worker of the loader, in page-locked memory.
    for copied in (pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert copied.samples == (origin,)
    moved = make_trainer()._prepare_inputs(batch)
    assert moved.keys() == batch.keys()
    assert moved.samples == ()


def test_long_lists_are_cut_in_messages() -> None:
    samples: Any = [(f"sample {number}", 1.0) for number in range(60)]
    text = describe_samples(samples)
    assert named_in(text) == [f"sample {number}" for number in range(50)]
    assert text.endswith("and 10 more")


# ---- skipping ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("bad", [0, 2])
def test_skipped_step_changes_neither_parameters_nor_moments(make_trainer: MakeTrainer, optim: str, bad: int) -> None:
    options = {"weight_decay": 0.1, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}
    trainer = make_trainer([T1] * 4, on_non_finite="skip", optim=optim, **options)
    spoil(trainer, {2 * bad})
    states = states_after_steps(trainer)
    same = [equal(before, after) for before, after in itertools.pairwise(states)]
    assert same == [step == bad for step in range(4)]
    assert trainer.state.global_step == 4
    assert all(bool(tensor.isfinite().all()) for tensor in states[-1].values())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [step + 1 for step in range(4) if step != bad]
    # The schedule advances in the skipped step as in the others.
    rates = {step + 1: 0.05 * (4 - step) / 4 for step in range(4)}
    assert [row["learning_rate"] for row in rows] == pytest.approx([rates[row["step"]] for row in rows])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_loss_is_the_mean_of_the_steps_that_were_taken(make_trainer: MakeTrainer, accumulation: int) -> None:
    batches = [T1] * 4 * accumulation
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation}
    plain = make_trainer(batches, **options)
    plain.train()
    losses = [row["loss"] for row in plain.state.log_history if "loss" in row]
    trainer = make_trainer(batches, on_non_finite="skip", logging_steps=2, **options)
    # The first micro-batch of the second step.
    spoil(trainer, {2 * accumulation})
    result = trainer.train()
    rows = trainer.state.log_history
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx([losses[0], (losses[2] + losses[3]) / 2])
    taken = [losses[0], losses[2], losses[3]]
    assert result.training_loss == rows[-1]["train_loss"] == pytest.approx(sum(taken) / 3)
    assert [(row["step"], row["non_finite/skipped"]) for row in rows if "non_finite/skipped" in row] == [
        (2, 1),
        (2, 1),
        (4, 1),
    ]
    (of_skipped,) = [row for row in rows if "loss" in row and row["step"] == 2]
    assert "grad_norm" not in of_skipped
    assert not [key for key in of_skipped if key.startswith("grad/")]


def test_log_without_skipped_steps_has_no_number(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([T1] * 2, on_non_finite="skip")
    trainer.train()
    assert not [key for row in trainer.state.log_history for key in row if key.startswith("non_finite")]


def test_one_more_skipped_step_than_allowed_stops_the_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([T1] * 5, on_non_finite="skip", max_skipped_steps=2)
    spoil(trainer, {0, 4, 6})
    with pytest.raises(NonFiniteError, match=r"(?s)step 4: the loss.*trainer\.max_skipped_steps") as raised:
        trainer.train()
    assert named_in(str(raised.value)) == ["sample 6"]
    assert trainer.non_finite.num_skipped == 2


def test_non_finite_parameter_stops_the_run_instead_of_being_skipped(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer([T1], on_non_finite="skip")
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = math.inf
    with pytest.raises(NonFiniteError, match="step 1: parameter"):
        trainer.train()


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_skip_is_logged_for_the_first_rank_with_the_names(
    make_trainer: MakeTrainer, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer([T1], on_non_finite=action)
    spoil(trainer, {1})
    with caplog.at_level(logging.WARNING, logger="umbrella_train"):
        if action == "skip":
            trainer.train()
        else:
            with pytest.raises(NonFiniteError):
                trainer.train()
    assert [named_in(record.getMessage()) for record in caplog.records] == ([["sample 1"]] if action == "skip" else [])


def test_steps_that_deepspeed_skips_are_logged(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.is_deepspeed_enabled, trainer.deepspeed = True, SimpleNamespace(skipped_steps=3)
    assert trainer.non_finite.add_counts({"loss": 1.0}) == {"loss": 1.0, "non_finite/skipped_by_deepspeed": 3}
    assert trainer.non_finite.add_counts({"eval_loss": 1.0}) == {"eval_loss": 1.0}
    trainer.deepspeed.skipped_steps = 0
    assert trainer.non_finite.add_counts({"loss": 1.0}) == {"loss": 1.0}


def test_unknown_action_is_rejected(make_trainer: MakeTrainer) -> None:
    with pytest.raises(RunError, match="on_non_finite is 'ignore'; it must be one of stop, skip"):
        make_trainer(on_non_finite="ignore")


def test_run_whose_first_step_was_skipped_resumes_without_moments(make_trainer: MakeTrainer) -> None:
    options = {"on_non_finite": "skip", "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    weights = []
    for resume in (None, "checkpoint-1"):
        trainer = make_trainer([T1] * 3, **options)
        spoil(trainer, {0})
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        assert (trainer.non_finite.num_skipped, trainer.state.global_step) == (1, 3)
        weights.append(state_of(trainer))
    assert equal(*weights)


# ---- evaluation ----


def test_non_finite_evaluation_loss_is_a_warning_with_the_samples(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = [[("T1",), ()], [("T1",), ("T1",)], [("dMRI",)]]
    trainer = make_trainer([T1] * 2, evaluation=kinds, eval_strategy="steps", eval_steps=1)
    # A sample of the evaluation only.
    spoil(trainer, {3})
    trainer.train_dataset = type(trainer.train_dataset)([[("dMRI",)]] * 2)
    trainer.train_dataset.batches = [[0], [1]]
    with caplog.at_level(logging.WARNING, logger="umbrella_train"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [named_in(record.getMessage()) for record in caplog.records] == [["sample 3"]] * 2
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [math.isnan(row["eval_loss"]) for row in rows] == [True, True]
    assert all(math.isfinite(row["eval/loss/dMRI"]) for row in rows)


def test_few_batches_of_an_evaluation_are_repeated(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(evaluation=[[("T1",)]] * 10)
    spoil(trainer, set(range(10)))
    forwards: list[None] = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(None))
    trainer.evaluate()
    assert len(forwards) == 10 + 8
    assert named_in(caplog.records[-1].getMessage()) == [f"sample {index}" for index in range(8)]
    assert "the first 8 of 10 batches" in caplog.records[-1].getMessage()


def test_run_continues_after_a_non_finite_evaluation_loss(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(tmp_path, trainer={"max_steps": 2, "eval_steps": 1})
    manifest = config.data.evaluation[0].manifest
    collate = SupervisedCollator.__call__
    spoilt: list[str] = []

    def with_nan(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        if examples[0].origin.manifest == str(manifest):
            (voxels, *_) = batch["pixel_values"].values()
            voxels[0] = math.nan
            spoilt.append(str(examples[0].origin))
        return batch

    monkeypatch.setattr(SupervisedCollator, "__call__", with_nan)
    folder = run.train(config)
    assert folder is not None
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [None, None]
    assert max(row["step"] for row in rows if "loss" in row) == 2
    texts = [record.getMessage() for record in caplog.records if "evaluation loss" in record.getMessage()]
    assert [set(named_in(text)) for text in texts] == [set(spoilt)] * 2
    listed = rows_of(folder / LIST_NAME)
    assert [(row["event"], row["loss"]) for row in listed] == [("evaluation", None)] * 2 * len(set(spoilt))
    names = {(who_is(row["subject"], folders=[folder])[0], row["line"]) for row in listed}
    assert {f"{manifest}, line {line}, subject {subject}" for subject, line in names} == set(spoilt)


# ---- a run, its folder and its resume ----


@pytest.fixture
def spoiled_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], list[Any]]:
    """Sets the voxels of a scan to NaN at given steps; the origins of the samples of these steps are appended."""

    def at(steps: Collection[int]) -> list[Any]:
        origins: list[Any] = []
        begin = run.UmbrellaTrainer.get_batch_samples

        def get(self: Any, *args: Any, **kwargs: Any) -> Any:
            batches, num_items = begin(self, *args, **kwargs)
            if batches and self.state.global_step + 1 in steps:
                (voxels, *_) = batches[0]["pixel_values"].values()
                voxels[0] = math.nan
                origins.append(batches[0].samples)
            return batches, num_items

        monkeypatch.setattr(run.UmbrellaTrainer, "get_batch_samples", get)
        return origins

    return at


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SKIPPING = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "on_non_finite": "skip",
}


def test_resumed_run_continues_the_count_and_equals_an_unbroken_one(
    make_config: Callable[..., RunConfig], tmp_path: Path, spoiled_runs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    origins = spoiled_runs({2, 5})
    config = make_config(tmp_path / "whole", trainer=SKIPPING, data={"evaluation": []})
    whole = run.train(config)
    assert whole is not None
    for number in (4, 6):  # the run stopped after checkpoint-2
        (whole / f"checkpoint-{number}").rename(tmp_path / f"whole-{number}")
    expected = rows_of(whole / "metrics.jsonl")
    listed = (whole / LIST_NAME).read_text()
    resumed = run.train(config, resume=str(whole / "checkpoint-2"))
    assert resumed == whole
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (load_file(path / name) for path in (tmp_path / "whole-6", whole / "checkpoint-6"))
        assert equal(first, second)
    kept = ("step", "loss", "non_finite/skipped", "learning_rate")
    rows, before = (
        [[row.get(key) for key in kept] for row in lines if "train_loss" not in row]
        for lines in (rows_of(whole / "metrics.jsonl"), expected)
    )
    assert rows == before
    counts = [(row["step"], row["non_finite/skipped"]) for row in expected if "non_finite/skipped" in row]
    assert counts == [(2, 1), (3, 1), (5, 2), (6, 2)]
    # By hash in the folder's files, once, and in plain text on the terminal.
    assert (whole / LIST_NAME).read_text() == listed
    found = [row for row in rows_of(whole / LIST_NAME) if row["loss"] is None]
    assert {(row["step"], row["event"]) for row in found} == {(2, "skipped"), (5, "skipped")}
    assert {row["line"] for row in found} <= {origin.line for samples in origins for origin in samples}
    names = [who_is(row[key], folders=[whole])[0] for row in found for key in ("manifest", "subject")]
    assert set(names) <= {value for samples in origins for each in samples for value in (each.manifest, each.subject)}
    texts = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert all(str(origins[0][0].manifest) in text for text in texts)
    assert len(texts) == 3
    written = "".join((whole / name).read_text() for name in (LIST_NAME, "metrics.jsonl"))
    assert "sub-" not in written
    assert ".jsonl" not in written


def test_limit_counts_the_steps_before_a_resume(
    make_config: Callable[..., RunConfig], tmp_path: Path, spoiled_runs: Any
) -> None:
    spoiled_runs({1, 4})
    config = make_config(tmp_path, trainer={**SKIPPING, "max_skipped_steps": 1}, data={"evaluation": []})
    with pytest.raises(NonFiniteError, match="step 4"):
        run.train(config)
    with pytest.raises(NonFiniteError, match="step 4"):
        run.train(config, resume="auto")
    folder = RunFolder.open(tmp_path / "run")
    assert {(row["step"], row["event"]) for row in rows_of(folder.path / LIST_NAME)} == {(1, "skipped"), (4, "stopped")}
    # A higher limit is no other training, but to skip at all is.
    more = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_skipped_steps": 2})})
    assert run.train(more, resume="auto") == folder.path
    stopping = config.model_copy(update={"trainer": config.trainer.model_copy(update={"on_non_finite": "stop"})})
    with pytest.raises(RunError, match=r"trainer\.on_non_finite"):
        run.train(stopping, resume=str(folder.path / "checkpoint-2"))
