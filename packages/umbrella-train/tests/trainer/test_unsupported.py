"""The trainer does not start with settings that it would not keep."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import TrainingArguments

from umbrella_model import set_trainable
from umbrella_train.config import DummyLossConfig
from umbrella_train.errors import RunError
from umbrella_train.trainer.unsupported import check_trainer


def test_an_unknown_word_is_rejected_with_those_that_are_known(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(
        RunError, match=r"(?s)engine is 'fsdp'; it must be one of ddp, fsdp2.*gradient_scale is 'presnt'"
    ):
        make_trainer(engine="fsdp", gradient_scale="presnt")


def test_float16_on_a_cpu_is_rejected(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match="fp16 needs a GPU"):
        make_trainer(fp16=True)


def test_fsdp2_needs_the_dummy_loss(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"dummy_loss\.enabled: false"):
        make_trainer(engine="fsdp2", dummy_loss={"enabled": False})


@pytest.fixture
def check(make_model: Callable[..., Any], tmp_path: Any) -> Callable[..., None]:
    """Holds settings against each other as the trainer does, for a model whose patch embeds alone learn."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fp16 = True
    model = make_model()
    set_trainable(model, "patch_embed_only")

    def run(*, absent: str = "update", zero_stage: int | None = None, **settings: Any) -> None:
        arguments.deepspeed_plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
        options = {"engine": "ddp", "gradient_scale": "mean", **settings}
        check_trainer(model, arguments, dummy_loss=DummyLossConfig(absent=absent), **options)

    return run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "fsdp2"}, "fp16 cannot be combined with engine fsdp2"),
        ({"absent": "hold"}, "hold with fp16 leaves the loss scaler without"),
        ({"absent": "hold", "zero_stage": 2}, "hold has no effect under DeepSpeed"),
        ({"zero_stage": 2}, "with DeepSpeed"),
    ],
)
def test_what_cannot_be_combined_is_rejected(check: Callable[..., None], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=says):
        check(**settings)


def test_adapters_in_patch_embeds_are_rejected_under_zero_3(make_model: Callable[..., Any], tmp_path: Any) -> None:
    model = make_model()
    embed = model.model.vision_tower.patch_embed("T1")
    embed.proj = nn.Sequential(embed.proj)  # no plain layer any more, as with adapters
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    settings = {"dummy_loss": DummyLossConfig(), "engine": "ddp", "gradient_scale": "mean"}
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    check_trainer(model, arguments, **settings)
    arguments.deepspeed_plugin.zero_stage = 3
    with pytest.raises(RunError, match="ZeRO-3"):
        check_trainer(model, arguments, **settings)
