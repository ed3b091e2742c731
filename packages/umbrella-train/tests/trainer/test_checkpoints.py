"""Checkpoints of the trainer: when they count as valid, and what is never read from them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from umbrella_train.checkpoint.integrity import checkpoint_problems, is_finished
from umbrella_train.errors import RunError
from umbrella_train.trainer import checkpoints
from umbrella_train.trainer.checkpoints import Checkpoints

MakeTrainer = Callable[..., Any]
BATCHES = [[("T1",)], [("dMRI",)], [("T1", "rsfMRI")], [()]]


@pytest.fixture
def make(make_trainer: MakeTrainer) -> MakeTrainer:
    """A trainer that saves every second of four steps."""

    def build(**arguments: Any) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        return make_trainer(BATCHES, **{**settings, **arguments})

    return build


def folder_of(trainer: Any, step: int) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def weights_of(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_checkpoint_with_a_pickle_is_rejected_unread(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trainer = make()
    trainer.train()
    for each in ("optimizer.pt", name):  # Hugging Face's Trainer reads the schedule only next to an optimizer
        torch.save({}, folder_of(trainer, 2) / each)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    with pytest.raises(RunError, match=rf"checkpoint-2: contains .*{name}"):
        make().train(resume_from_checkpoint=str(folder_of(trainer, 2)))


def test_checkpoint_is_not_valid_until_its_training_state_is_written(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().train()  # leaves valid checkpoints where others are written now
    trainer = make()

    def stop(folder: Path, **_: Any) -> None:
        assert (folder / "trainer_state.json").is_file()
        assert (folder / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_training_state", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_finished(folder_of(trainer, 2))
    assert not trainer.is_in_train


def test_true_resumes_from_the_newest_valid_checkpoint(make: MakeTrainer) -> None:
    whole = make()
    whole.train()
    (folder_of(whole, 4) / "integrity.json").unlink()
    resumed = make()
    steps: list[int] = []
    compute_loss = resumed.compute_loss
    resumed.compute_loss = lambda *args, **kwargs: (
        steps.append(resumed.state.global_step),
        compute_loss(*args, **kwargs),
    )[1]
    resumed.train(resume_from_checkpoint=True)
    assert steps == [2, 3]
    assert all(map(torch.equal, weights_of(resumed), weights_of(whole)))


def test_second_training_saves_before_an_evaluation_as_the_first_does(make: MakeTrainer) -> None:
    trainer = make(save_steps=4, eval_strategy="steps", eval_steps=4)
    orders: list[bool] = []
    evaluation_loop = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *args, **kwargs: (
        trainer.checkpoints.wait(),
        orders.append(is_finished(folder_of(trainer, 4))),
        evaluation_loop(*args, **kwargs),
    )[2]
    trainer.train()
    (folder_of(trainer, 4) / "integrity.json").unlink()
    trainer.train()
    assert orders == [True, True]


@pytest.mark.parametrize("folder", ["missing", "."])
def test_folder_that_is_no_checkpoint_is_rejected_by_its_name(make: MakeTrainer, tmp_path: Path, folder: str) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path / folder}: is not a checkpoint"):
        make().train(resume_from_checkpoint=str(tmp_path / folder))


def test_data_worker_that_dies_does_not_spoil_a_save(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, frame: object) -> None:
        raise RuntimeError("a worker died")

    write = TrainerState.save_to_json

    def write_when_a_worker_dies(state: Any, path: str) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        write(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", write_when_a_worker_dies)
    trainer = make()
    before = signal.signal(signal.SIGCHLD, fail)
    try:
        trainer.train()
        assert signal.getsignal(signal.SIGCHLD) is fail
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert checkpoint_problems(folder_of(trainer, 4)) == []


class OnSave(TrainerCallback):
    """Lists the problems of each checkpoint, as a callback that copies it elsewhere would find it."""

    def __init__(self) -> None:
        self.problems: dict[int, list[str]] = {}
        self.trainer: Any = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.checkpoints.wait()
        folder = self.trainer.checkpoints.folder_of(state.global_step)
        self.problems[state.global_step] = checkpoint_problems(folder)


def test_callbacks_of_users_can_wait_for_a_finished_checkpoint(make: MakeTrainer) -> None:
    seen = OnSave()
    seen.trainer = make(callbacks=[seen])
    seen.trainer.train()
    assert seen.problems == {2: [], 4: []}


def test_an_older_checkpoint_is_valid_until_the_new_one_is(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk: hashing ends only when the next checkpoint is due."""
    trainer = make(save_total_limit=1)
    finish, valid = Checkpoints._finish, {}

    def finish_late(self: Checkpoints, folder: Path, *, best: Path | None) -> None:
        while trainer.state.global_step < trainer.state.max_steps and folder.name != "checkpoint-4":
            time.sleep(0.01)
        valid[folder.name] = sorted(path.parent.name for path in folder.parent.glob("checkpoint-*/integrity.json"))
        finish(self, folder, best=best)

    monkeypatch.setattr(Checkpoints, "_finish", finish_late)
    trainer.train()
    assert valid == {"checkpoint-2": [], "checkpoint-4": ["checkpoint-2"]}
    assert checkpoint_problems(folder_of(trainer, 4)) == []
    assert not folder_of(trainer, 2).exists()


def test_a_failure_in_the_background_ends_the_training(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_finish", fail)
    trainer = make()
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.state.global_step < 4


def test_arguments_can_be_used_for_another_trainer(make: MakeTrainer) -> None:
    trainer = make(save_total_limit=1)
    trainer.train()
    assert [path.name for path in folder_of(trainer, 4).parent.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (trainer.given.save_total_limit, trainer.given.save_only_model) == (1, False)
