"""A dry run: two steps, a table, and no files."""

from __future__ import annotations

import logging
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.config import RunConfig
from umbrella_train.run.training import train
from umbrella_train.trainer import dry_run


def test_dry_run_logs_tokens_and_memory_and_leaves_no_files(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch, here = tmp_path / "scratch", tmp_path / "here"
    scratch.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    config = make_config(tmp_path / "runs", model={"learn": {"preset": "patch_embed_only"}})
    with caplog.at_level(logging.INFO, logger="umbrella_train"):
        assert train(config, dry_run=True) is None
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == []
    assert not (tmp_path / "runs").exists()
    tokens = dict(re.findall(r"^(rsfMRI|T1|dMRI) +([\d,]+)$", caplog.text, flags=re.MULTILINE))
    assert tokens == {"rsfMRI": "4", "T1": "8", "dMRI": "4"}
    parameters = re.findall(r"^(\S+) +([\d,]+) +([\d,]+)$", caplog.text, flags=re.MULTILINE)
    counts = {
        part: (int(number.replace(",", "")), int(learning.replace(",", ""))) for part, number, learning in parameters
    }
    assert any(learning > 0 for _, learning in counts.values())
    assert any(number > 0 and learning == 0 for number, learning in counts.values())
    steps = re.findall(r"step (\d+): loss \d+\.\d{4}, \d+\.\d\d s, peak memory \d+\.\d\d GiB", caplog.text)
    assert steps == ["1", "2"]
    warning = "vision_tower, projector, language_model, embeddings: random weights that are not trained"
    assert sum(record.getMessage().startswith(warning) for record in caplog.records) == 1


def test_run_logs_the_same_table_at_its_start(
    make_config: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, trainer={"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 2})
    with caplog.at_level(logging.INFO, logger="umbrella_train"):
        assert train(config.model_copy(update={"data": config.data.model_copy(update={"evaluation": []})})) is not None
    assert re.search(r"^projector +[\d,]+ +[1-9][\d,]*$", caplog.text, flags=re.MULTILINE)
    assert re.search(r"^rsfMRI +4$", caplog.text, flags=re.MULTILINE)
    assert "random weights" not in caplog.text


@pytest.mark.parametrize(
    ("value", "parts"), [(True, {"vision_tower", "language_model"}), ("language_model", {"language_model"})]
)
def test_gradient_checkpointing_applies_to_the_selected_parts(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: bool | str,
    parts: set[str],
) -> None:
    built: list[TrainingComponents] = []

    def build_and_keep(config: RunConfig) -> TrainingComponents:
        built.append(build_components(config))
        return built[-1]

    monkeypatch.setattr("umbrella_train.run.training.build_components", build_and_keep)
    train(make_config(tmp_path, trainer={"gradient_checkpointing": value, "use_cpu": True}), dry_run=True)
    model = built[0].model.model
    layers = {
        "vision_tower": model.vision_tower.encoder.encoder.layers,
        "language_model": model.language_model.layers,
    }
    assert {part for part in layers if all(layer.gradient_checkpointing for layer in layers[part])} == parts
    assert {part for part in layers if any(layer.gradient_checkpointing for layer in layers[part])} == parts


@pytest.mark.parametrize(
    ("platform", "largest", "expected"),
    [("linux", 3 * 2**20, "3.00 GiB of the process"), ("darwin", 3 * 2**30, "3.00 GiB of the process")],
)
def test_peak_memory_has_the_unit_of_the_system(
    platform: str, largest: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=largest))
    assert dry_run._peak_memory() == expected
    monkeypatch.setattr(dry_run, "resource", None)
    assert dry_run._peak_memory() == "unknown"
