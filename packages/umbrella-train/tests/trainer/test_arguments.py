"""Hugging Face's arguments from a config, and launches that are rejected."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.trainer.arguments import build_arguments, on_one_device

MakeConfig = Callable[..., RunConfig]


def test_defaults_that_would_train_wrongly_are_replaced(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path, trainer={"max_steps": 7, "learning_rate": 3e-4, "use_cpu": True})
    arguments = build_arguments(config, output_dir=tmp_path / "run")
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (7, 3e-4, 0)
    assert arguments.remove_unused_columns is False
    assert arguments.label_names == ["labels"]
    assert arguments.ddp_find_unused_parameters is False
    assert arguments.logging_nan_inf_filter is False
    assert arguments.average_tokens_across_devices is True
    assert arguments.report_to == []
    assert not (tmp_path / "run").exists()


def test_eval_steps_select_the_evaluation_strategy(make_config: MakeConfig, tmp_path: Path) -> None:
    never = build_arguments(make_config(tmp_path, trainer={"use_cpu": True}), output_dir=tmp_path)
    often = build_arguments(make_config(tmp_path, trainer={"use_cpu": True, "eval_steps": 5}), output_dir=tmp_path)
    assert (never.eval_strategy, often.eval_strategy, often.eval_steps) == ("no", "steps", 5)


def test_hugging_face_starts_no_tracker(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://example.org")  # a tracker that it adds by itself
    config = make_config(tmp_path, trainer={"report_to": ["wandb", "mlflow"], "use_cpu": True})
    assert build_arguments(config, output_dir=tmp_path).report_to == []


def test_dry_run_has_two_steps_and_saves_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path, trainer={"max_steps": 500, "eval_steps": 1, "report_to": ["wandb"], "use_cpu": True})
    arguments = build_arguments(config, output_dir=tmp_path, dry_run=True)
    assert (arguments.max_steps, arguments.logging_steps) == (2, 1)
    assert (arguments.save_strategy, arguments.eval_strategy, arguments.report_to) == ("no", "no", [])


def test_wrong_world_size_is_rejected_with_both_numbers(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path, trainer={"world_size": 4, "use_cpu": True})
    with pytest.raises(RunError, match=r"world_size is 4, .* launched is 1; .*--nproc-per-node 4"):
        build_arguments(config, output_dir=tmp_path)
    build_arguments(make_config(tmp_path, trainer={"world_size": 1, "use_cpu": True}), output_dir=tmp_path)


def test_fp16_on_a_cpu_is_rejected(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.use_cpu\n.*use bf16"):
        make_config(tmp_path, trainer={"fp16": True, "use_cpu": True})


def test_one_process_with_several_gpus_uses_one_and_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, make_trainer: Callable[..., Any]
) -> None:
    arguments = SimpleNamespace(n_gpu=4, _n_gpu=4)
    with caplog.at_level(logging.WARNING):
        one = on_one_device(arguments)  # type: ignore[arg-type]
    assert (one._n_gpu, arguments._n_gpu) == (1, 4)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 1 if arguments._n_gpu == 1 else 4))
    assert make_trainer().args.n_gpu == 1
    assert "sees 4 GPUs and uses one" in caplog.text
    assert "--nproc-per-node 4" in caplog.text
