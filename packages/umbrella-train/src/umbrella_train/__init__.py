"""Trains UMBRELLA models: configuration, dummy loss, trainer, evaluation and report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbrella_train.config import load_config
    from umbrella_train.dummy_loss import DummyLoss
    from umbrella_train.run import evaluate_run, train
    from umbrella_train.trainer import UmbrellaTrainer

__all__ = ["DummyLoss", "UmbrellaTrainer", "evaluate_run", "load_config", "train"]

_HOMES = {
    "DummyLoss": "dummy_loss",
    "UmbrellaTrainer": "trainer",
    "evaluate_run": "run",
    "load_config": "config",
    "train": "run",
}


def __getattr__(name: str) -> object:
    # PEP 562: the commands' --help must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
