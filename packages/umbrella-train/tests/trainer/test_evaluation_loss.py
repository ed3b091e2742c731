"""The evaluation loss: any mixture, no dummy term, and the mean over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from umbrella_model import supervised_index
from umbrella_train.errors import RunError
from umbrella_train.trainer.evaluation_loss import EvaluationLoss

KINDS = [("T1",), ("rsfMRI",), ("dMRI",), ("T1", "dMRI"), (), ("T1", "rsfMRI", "dMRI")]
# A term of this weight would exceed the task loss.
LOUD = {"scale": 1e6}


def summed_loss(model: Any, batch: dict[str, Any]) -> tuple[float, int]:
    """The sum of the cross-entropy over the supervised tokens of a batch, and their number."""
    model.eval()
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"][:, 1:].flatten()
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels, ignore_index=-100, reduction="sum")
    return float(losses), int((labels != -100).sum())


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS], ids=str)
def test_prediction_step_returns_the_task_loss(
    make_trainer: Callable[..., Any],
    make_example: Callable[..., Any],
    collate: Callable[..., Any],
    kinds: list[tuple[str, ...]],
) -> None:
    trainer = make_trainer(dummy_loss=LOUD)
    batch = collate([make_example(kind, index) for index, kind in enumerate(kinds)])
    inputs = {**batch, "supervised_index": supervised_index(batch["labels"])}
    loss, logits, labels = trainer.prediction_step(trainer.model.eval(), inputs, prediction_loss_only=False)
    total, count = summed_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.equal(labels, batch["labels"])


def test_evaluate_returns_the_mean_over_tokens_for_each_set_of_modalities(
    make_trainer: Callable[..., Any], make_example: Callable[..., Any], collate: Callable[..., Any]
) -> None:
    batches = [[("T1",)] * 2, [("T1",)] * 3, [("rsfMRI",)], [("T1", "dMRI"), ("dMRI", "T1")], [()]]
    trainer = make_trainer(evaluation=batches, dummy_loss=LOUD)
    modes: list[bool] = []
    trainer.model.train().register_forward_pre_hook(lambda model, _: modes.append(model.training))
    metrics = trainer.evaluate()
    assert modes == [False] * len(batches)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for index, kind in enumerate(kind for batch in batches for kind in batch):
        loss, count = summed_loss(trainer.model, collate([make_example(kind, index)]))
        for group in ("all", "+".join(name for name in ("rsfMRI", "T1", "dMRI") if name in kind) or "text"):
            sums[group][0] += loss
            sums[group][1] += count
    expected = {group: loss / count for group, (loss, count) in sums.items()}
    assert metrics["eval_loss"] == pytest.approx(expected.pop("all"), rel=1e-5)
    assert set(expected) == {"T1", "rsfMRI", "T1+dMRI", "text"}
    by_group = {key: value for key, value in metrics.items() if key.startswith("eval/loss/")}
    assert by_group == {f"eval/loss/{group}": pytest.approx(value, rel=1e-5) for group, value in expected.items()}


def test_evaluate_takes_several_data_sets_by_name(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(evaluation=[[("T1",)], [("rsfMRI",)]])
    alone = trainer.evaluate()["eval_loss"]
    other = type(trainer.eval_dataset)([[("dMRI",)]])
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": other}
    metrics = trainer.evaluate()
    assert (metrics["eval_a_loss"], metrics["eval_b_loss"]) == (alone, trainer.evaluate(other)["eval_loss"])


def test_evaluation_during_training_does_not_change_training(train_batches: Callable[..., Any]) -> None:
    batches = [[("T1",)], [("dMRI",)], [("T1",)]]
    plain = train_batches(batches)
    watched = train_batches(batches, evaluation=[[("rsfMRI",)], [()]], eval_strategy="steps", eval_steps=1)
    assert [row["loss"] for row in watched.log] == [row["loss"] for row in plain.log]
    history = [row for row in watched.trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in history] == [1, 2, 3]
    assert all({"eval/loss/rsfMRI", "eval/loss/text"} <= set(row) for row in history)


def test_loss_without_samples_is_nan() -> None:
    metrics, num_samples = EvaluationLoss(["T1"], device=torch.device("cpu")).reduce(prefix="eval")
    assert list(metrics) == ["eval_loss"]
    assert metrics["eval_loss"] != metrics["eval_loss"]
    assert num_samples == 0


def test_loss_is_weighted_by_tokens_and_counts_samples() -> None:
    total = EvaluationLoss(["T1", "dMRI"], device=torch.device("cpu"))
    for loss, num_tokens, present in ((1.0, 1, ["T1"]), (5.0, 3, ["T1"]), (2.0, 4, ["dMRI", "T1"])):
        # The first position is not predicted: its label does not count.
        labels = torch.tensor([[7, *range(num_tokens), -100], [-100] * (num_tokens + 2)])
        total.add(torch.tensor(loss), {"labels": labels, "pixel_values": dict.fromkeys(present)})
    metrics, num_samples = total.reduce(prefix="test")
    assert metrics == {"test_loss": 3.0, "test/loss/T1": 4.0, "test/loss/T1+dMRI": 2.0}
    assert num_samples == 6


def test_predict_is_rejected_and_names_the_commands(make_trainer) -> None:
    with pytest.raises(RunError, match="umbrella-eval"):
        make_trainer([[("T1",)]]).predict([])
