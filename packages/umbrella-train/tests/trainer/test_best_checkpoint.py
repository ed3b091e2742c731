"""The best checkpoint by a logged key, early stopping, and both after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.run.training import train
from umbrella_train.trainer.best_checkpoint import BestCheckpoint
from umbrella_train.trainer.evaluation_loss import EvaluationLoss
from umbrella_train.trainer.trainer import UmbrellaTrainer

MakeConfig = Callable[..., RunConfig]
# Evaluation losses of steps 1, 2, ...; the last one is that of all later steps.
LOSSES = (5.0, 3.0, 4.0, math.nan, 6.0)


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """A config of six steps with an evaluation after each, whose losses are `losses`."""

    def make(*, losses: Sequence[float] = LOSSES, key: str = "eval_loss", **trainer: Any) -> RunConfig:
        steps: list[int] = []
        evaluate = UmbrellaTrainer.evaluation_loop

        def evaluation_loop(self: UmbrellaTrainer, *args: Any, **kwargs: Any) -> Any:
            steps.append(self.state.global_step)
            return evaluate(self, *args, **kwargs)

        def reduce(_: EvaluationLoss, *, prefix: str) -> tuple[dict[str, float], int]:
            value = losses[min(steps[-1], len(losses)) - 1]
            return {f"{prefix}_loss": 1.0, f"{prefix}/loss/T1": 1.0, key: value}, 1

        monkeypatch.setattr(UmbrellaTrainer, "evaluation_loop", evaluation_loop)
        monkeypatch.setattr(EvaluationLoss, "reduce", reduce)
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 100,
            "eval_steps": 1,
            "logging_steps": 1,
            "use_cpu": True,
            **trainer,
        }
        report = {"enabled": False, "pictures": False, "controls": False, "max_new_tokens": 1}
        return make_config(tmp_path, trainer=settings, report=report)

    return make


def run_of(config: RunConfig, **options: Any) -> Path:
    folder = train(config, **options)
    assert folder is not None
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def equal_weights(folder: Path, other: Path) -> bool:
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, other))
    return all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_best_checkpoint_is_kept_and_its_weights_are_those_of_the_run(make_run: Callable[..., RunConfig]) -> None:
    folder = run_of(make_run(load_best_model_at_end=True, save_steps=3, save_total_limit=1))
    # Step 2 is saved because it is the best; the newest is that of the last step.
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert equal_weights(folder / "model", folder / "checkpoint-2")
    assert not equal_weights(folder / "model", folder / "checkpoint-6")
    assert {"step": 6, "best/step": 2, "best/value": 3.0} in rows_of(folder)


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 4), (4, 6), (5, 6)])
def test_a_run_stops_after_values_without_improvement(
    make_run: Callable[..., RunConfig], patience: int, last: int
) -> None:
    folder = run_of(make_run(early_stopping_patience=patience))
    assert max(row["step"] for row in rows_of(folder) if "loss" in row) == last
    assert (folder / "FINISHED").exists()


@pytest.mark.parametrize("save_steps", [100, 1])
def test_a_resumed_run_counts_on(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    config = make_run(early_stopping_patience=3, load_best_model_at_end=True, save_steps=save_steps)
    step = UmbrellaTrainer.training_step

    def interrupted(self: UmbrellaTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise OSError("interrupted")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UmbrellaTrainer, "training_step", interrupted)
        with pytest.raises((RunError, OSError)):
            train(config)
    folder = run_of(config, resume="auto")
    assert max(row["step"] for row in rows_of(folder) if "loss" in row) == 5
    assert {"step": 5, "best/step": 2, "best/value": 3.0} in rows_of(folder)
    assert equal_weights(folder / "model", folder / "checkpoint-2")


def test_a_run_that_is_resumed_where_it_stopped_early_trains_no_further(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(early_stopping_patience=1, save_steps=1)

    def stopped(*_: Any, **__: Any) -> None:
        raise RunStoppedError(None, step=3, signal_number=15)

    with monkeypatch.context() as patch:
        patch.setattr(UmbrellaTrainer, "save_model", lambda self, folder, _internal_call=False: (
            self.checkpoints.write_model(Path(folder), is_checkpoint=True) if _internal_call else stopped()
        ))  # fmt: skip
        with pytest.raises(RunStoppedError):
            train(config)
    folder = run_of(config, resume="auto")
    assert [row["step"] for row in rows_of(folder) if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize(("num_worse", "stops"), [(1, False), (2, True)])
def test_a_checkpoint_that_is_saved_after_the_value_that_stops_the_run(num_worse: int, stops: bool) -> None:
    # Of values of a training step: the evaluation of a step is done again.
    state, control = TrainerState(stateful_callbacks={"values_without_improvement": num_worse}), TrainerControl()  # type: ignore[arg-type]
    best = BestCheckpoint(Any, metric="loss", is_greater_better=False, patience=2)  # type: ignore[arg-type]
    best.on_train_begin(Any, state, control)  # type: ignore[arg-type]
    assert control.should_training_stop is stops


@pytest.mark.parametrize(
    ("key", "losses", "greater", "best"), [("eval/loss/T1", LOSSES, None, 2), ("eval/loss/T1", LOSSES, True, 5)]
)
def test_any_logged_key_and_direction(
    make_run: Callable[..., RunConfig], key: str, losses: Sequence[float], greater: bool | None, best: int
) -> None:
    config = make_run(losses=losses, key=key, metric_for_best_model=key, greater_is_better=greater)
    assert (run_of(config) / f"checkpoint-{best}").is_dir()


def test_a_key_that_evaluations_do_not_have(make_run: Callable[..., RunConfig]) -> None:
    with pytest.raises(RunError, match="eval/loss/T2"):
        train(make_run(metric_for_best_model="eval/loss/T2"))


@pytest.mark.parametrize(
    ("trainer", "word"),
    [
        ({"metric_for_best_model": "eval/accuracy/T1"}, "only at the end"),
        ({"metric_for_best_model": "evalloss"}, "eval_loss"),
        ({"metric_for_best_model": "eval_loss", "eval_steps": None}, "eval_steps"),
        ({"early_stopping_patience": 2, "eval_steps": None}, "eval_steps"),
        ({"metric_for_best_model": "grad_norm"}, "greater_is_better"),
        ({"greater_is_better": True}, "metric_for_best_model"),
    ],
)
def test_wrong_settings_are_problems_of_the_config(
    make_run: Callable[..., RunConfig], trainer: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        make_run(**trainer)
