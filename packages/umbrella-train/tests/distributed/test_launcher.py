"""Launcher settings that the run does not support are rejected."""

from __future__ import annotations

import pytest

from umbrella_train.config import load_config
from umbrella_train.distributed.launcher import check_launcher
from umbrella_train.errors import RunError


def test_ordinary_launch_is_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launcher(load_config(None))


def test_fsdp_through_accelerate_is_rejected_with_the_engine_to_set(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"trainer\.engine: fsdp2"):
        check_launcher(load_config(None))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"trainer\.torch_compile: true instead"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 gradient accumulation steps and the config for 1"),
    ],
)
def test_unsupported_accelerate_setting_is_rejected(monkeypatch, variable, value, says):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    check_launcher(load_config(None))
    monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=says):
        check_launcher(load_config(None))


@pytest.mark.parametrize(
    ("asked", "words", "is_fine"), [("bf16", [], False), ("bf16", ["--trainer.bf16", "true"], True)]
)
def test_precision_of_launcher_and_config_must_match(monkeypatch, asked, words, is_fine):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    if is_fine:
        check_launcher(load_config(None, words))
    else:
        with pytest.raises(RunError, match=r"trainer\.bf16: true"):
            check_launcher(load_config(None, words))
