"""Packed training: one row per batch, and the numbers of padded training."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from umbrella_model import set_trainable
from umbrella_train.batches.collators import PackedCollator, conversation_index, num_conversations
from umbrella_train.config import DummyLossConfig, RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import train
from umbrella_train.trainer.accumulation import AccumulationWindow
from umbrella_train.trainer.evaluation_loss import EvaluationLoss
from umbrella_train.trainer.unsupported import check_trainer

KINDS = [("T1",), ("T1", "dMRI"), (), ("T1", "T1")]
# Of different lengths and numbers of supervised tokens; only one sample has dMRI.
BATCHES = [[("T1",), ("rsfMRI", "T1"), ()], [("T1", "dMRI"), (), ("T1", "T1")]]


@pytest.fixture
def both(make_example: Callable[..., Any], collate: Callable[..., Any]) -> list[dict[str, Any]]:
    """The same four conversations, padded and packed."""
    examples = [make_example(kind, index) for index, kind in enumerate(KINDS)]
    # As in a loader worker.
    packed = pickle.loads(pickle.dumps(PackedCollator(collate)))
    return [collate(examples), packed(examples)]


def test_packed_batch_is_one_row_without_padding(both: list[dict[str, Any]]) -> None:
    padded, packed = both
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert padded["attention_mask"].numel() > packed["input_ids"].numel()


def test_conversations_are_counted_and_indexed_padded_and_packed(both: list[dict[str, Any]]) -> None:
    padded, packed = both
    assert num_conversations(padded) == num_conversations(packed) == len(KINDS)
    is_token = padded["attention_mask"].bool()
    assert conversation_index(packed).shape == packed["labels"].shape
    assert conversation_index(packed).flatten().tolist() == conversation_index(padded)[is_token].tolist()


def test_tokens_of_each_modality_are_counted_by_conversation(both: list[dict[str, Any]]) -> None:
    for batch in both:
        window = AccumulationWindow(["rsfMRI", "T1", "dMRI"])
        window.add_loss(torch.tensor(1.0))
        window.see(batch)
        facts = window.close()
        # The answer of conversation i has 2 + i tokens.
        assert facts.num_tokens == 2 + 3 + 4 + 5
        assert facts.tokens_with == {"T1": 2 + 3 + 5, "dMRI": 3}


def test_evaluation_counts_conversations(both: list[dict[str, Any]]) -> None:
    for batch in both:
        total = EvaluationLoss(["rsfMRI", "T1", "dMRI"], device=torch.device("cpu"))
        total.add(torch.tensor(2.0), batch)
        assert total.reduce(prefix="eval") == ({"eval_loss": 2.0, "eval/loss/T1+dMRI": 2.0}, len(KINDS))


@pytest.mark.parametrize("scale", ["mean", "present"])
def test_packed_training_equals_padded_training(train_batches: Callable[..., Any], make_model: Any, scale: str) -> None:
    runs = []
    for packing in (False, True):
        model = make_model()
        model.set_attn_implementation("varlen")
        options = {"gradient_scale": scale, "gradient_accumulation_steps": 2, "evaluation": BATCHES}
        runs.append(train_batches(BATCHES, model=model, packing=packing, **options))
    padded, packed = runs
    assert len(padded.gradients) == len(packed.gradients) == 1
    for name, gradient in padded.gradients[0].items():
        assert torch.allclose(packed.gradients[0][name], gradient, rtol=1e-4, atol=1e-7), name
    for key, value in padded.log[0].items():
        if "time" not in key:
            assert packed.log[0][key] == pytest.approx(value, rel=1e-4), key
    losses = [run.trainer.evaluate() for run in runs]
    for key in ("eval_loss", "eval/loss/rsfMRI+T1", "eval/loss/T1+dMRI"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-5)


@pytest.fixture
def check(make_model: Callable[..., Any], tmp_path: Any) -> Callable[..., None]:
    """Checks packing with a model and a device as the trainer does."""

    def run(
        *,
        attention: str = "varlen",
        device: str = "cpu",
        dropout: float = 0.0,
        precision: str = "no",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        arguments.mixed_precision = precision
        arguments.__dict__["_setup_devices"] = torch.device(device)
        model = make_model().to(dtype)
        set_trainable(model, "full")
        model.model.language_model.config._attn_implementation_internal = attention
        model.model.language_model.config.attention_dropout = dropout
        options = {"engine": "ddp", "gradient_scale": "mean", "packing": True}
        check_trainer(model, arguments, dummy_loss=DummyLossConfig(), **options)

    return run


def test_rejected_run_leaves_no_folder(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(tmp_path, data={"packing": True}, model={"attn_implementation": "sdpa"})
    with pytest.raises(RunError, match="with attention sdpa"):
        train(config)
    assert not list(config.output_dir.glob("*"))


def test_unsupported_attention_dropout_and_precision_are_rejected(check: Callable[..., None]) -> None:
    check()
    check(device="cuda", precision="bf16")
    check(device="cuda", precision="fp16")
    check(device="cuda", dtype=torch.bfloat16)
    check(attention="flash_attention_2", dropout=0.1)
    with pytest.raises(RunError, match=r"data\.packing: true with attention sdpa"):
        check(attention="sdpa")
    with pytest.raises(RunError, match=r"attention dropout, which is 0\.1"):
        check(dropout=0.1)
    with pytest.raises(RunError, match=r"bfloat16 or float16 on a GPU: set trainer\.bf16: true"):
        check(device="cuda")
