"""Unsupported combinations of trainer settings are rejected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import TrainingArguments

from umbrella_model import set_trainable
from umbrella_train.checkpoint.integrity import write_integrity_manifest
from umbrella_train.config import DummyLossConfig, RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import train
from umbrella_train.trainer.unsupported import check_trainer


def test_unknown_values_are_rejected_with_the_known_ones(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(
        RunError, match=r"(?s)engine is 'fsdp'; it must be one of ddp, fsdp2.*gradient_scale is 'presnt'"
    ):
        make_trainer(engine="fsdp", gradient_scale="presnt")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batches_are": "by_modalty"}, "batches is 'by_modalty'; it must be one of by_modality, mixed, by_length"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"compute_metrics": len}, "compute_metrics"),
        ({"model": nn.Linear(2, 2)}, "Linear has no patch embeds"),
        (
            {"engine": "fsdp2", "load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        ),
    ],
)
def test_what_would_be_ignored_or_fail_at_the_end_is_rejected(
    make_trainer: Callable[..., Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(RunError, match=says):
        make_trainer(**settings)


def test_float16_on_a_cpu_is_rejected(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match="fp16 needs a GPU"):
        make_trainer(fp16=True)


def test_fsdp2_needs_the_dummy_loss(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"dummy_loss\.enabled: false"):
        make_trainer(engine="fsdp2", dummy_loss={"enabled": False})


def plugin_of(zero_stage: int, *, gathers: Any = True) -> SimpleNamespace:
    return SimpleNamespace(zero_stage=zero_stage, hf_ds_config=SimpleNamespace(get_value=lambda key: gathers))


@pytest.fixture
def check(make_model: Callable[..., Any], tmp_path: Any) -> Callable[..., None]:
    """Checks settings as the trainer does, for a model of which only the patch embeds are trained."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.fp16 = True
    model = make_model()
    set_trainable(model, "patch_embed_only")

    def run(*, absent: str = "update", zero_stage: int | None = None, **settings: Any) -> None:
        arguments.deepspeed_plugin = None if zero_stage is None else plugin_of(zero_stage)
        options = {"engine": "ddp", "gradient_scale": "mean", **settings}
        check_trainer(model, arguments, dummy_loss=DummyLossConfig(absent=absent), **options)

    return run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "fsdp2"}, "fp16 cannot be combined with engine fsdp2"),
        ({"absent": "hold"}, "hold with fp16 leaves the loss scaler without"),
        ({"absent": "hold", "zero_stage": 2}, "hold has no effect under DeepSpeed"),
        ({"zero_stage": 2}, "fp16 is not supported with DeepSpeed"),
        ({"zero_stage": 2, "gradient_scale": "present"}, "gradient_scale: present"),
        ({"zero_stage": 2, "engine": "fsdp2"}, "fsdp2 and DeepSpeed"),
        ({"on_non_finite": "skip"}, "on_non_finite: skip cannot be combined with fp16"),
    ],
)
def test_unsupported_combination_is_rejected(check: Callable[..., None], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=says):
        check(**settings)


def test_skipped_steps_are_rejected_with_deepspeed(make_model: Callable[..., Any], tmp_path: Any) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    settings = {"dummy_loss": DummyLossConfig(), "engine": "ddp", "gradient_scale": "mean", "on_non_finite": "skip"}
    check_trainer(make_model(), arguments, **settings)
    arguments.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    with pytest.raises(RunError, match="on_non_finite: skip is not supported with DeepSpeed"):
        check_trainer(make_model(), arguments, **settings)


def test_run_with_fp16_and_no_gpu_is_rejected_before_a_folder_is_created(
    make_config: Callable[..., RunConfig], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = make_config(tmp_path / "runs", trainer={"fp16": True, "use_cpu": False})
    with pytest.raises(RunError, match="fp16 needs a GPU"):
        train(config)
    assert not config.output_dir.exists()


def test_resumed_run_is_rejected_before_its_config_is_replaced(
    make_config: Callable[..., RunConfig], tmp_path: Any
) -> None:
    config = make_config(tmp_path, data={"packing": True}, model={"attn_implementation": "sdpa"})
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: run\n")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    write_integrity_manifest(checkpoint)
    with pytest.raises(RunError, match=r"data\.packing"):
        train(config, resume=str(folder))
    assert (folder / "config.yaml").read_text() == "name: run\n"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "config.yaml"]


def test_adapters_in_patch_embeds_are_rejected_under_zero_3(make_model: Callable[..., Any], tmp_path: Any) -> None:
    model = make_model()
    embed = model.model.vision_tower.patch_embed("T1")
    embed.proj = nn.Sequential(embed.proj)  # not a Linear, as with adapters
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    settings = {"dummy_loss": DummyLossConfig(), "engine": "ddp", "gradient_scale": "mean"}
    arguments.deepspeed_plugin = plugin_of(2)
    check_trainer(model, arguments, **settings)
    arguments.deepspeed_plugin.zero_stage = 3
    with pytest.raises(RunError, match="ZeRO-3"):
        check_trainer(model, arguments, **settings)


@pytest.mark.parametrize("gathers", [True, False, None, "auto"])
def test_zero_3_must_gather_the_weights_that_it_saves(
    make_model: Callable[..., Any], tmp_path: Any, gathers: Any
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    settings = {"dummy_loss": DummyLossConfig(), "engine": "ddp", "gradient_scale": "mean"}
    arguments.deepspeed_plugin = plugin_of(3, gathers=gathers)
    with nullcontext() if gathers is True else pytest.raises(RunError, match="zero3_save_16bit_model: true"):
        check_trainer(make_model(), arguments, **settings)
    arguments.deepspeed_plugin.zero_stage = 2
    check_trainer(make_model(), arguments, **settings)


def test_settings_are_checked_once_per_run(
    make_config: Callable[..., RunConfig], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []

    def count(*args: Any, **kwargs: Any) -> None:
        checks.append(args)
        check_trainer(*args, **kwargs)

    monkeypatch.setattr("umbrella_train.trainer.trainer.check_trainer", count)
    train(make_config(tmp_path, trainer={"max_steps": 1, "save_steps": 1}))
    assert len(checks) == 1
