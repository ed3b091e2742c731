"""A run's folder with a model of random weights, whose answers differ from scan to scan."""

from __future__ import annotations

from pathlib import Path

import torch

from umbrella_train.assembly.build import build_components
from umbrella_train.config import RunConfig


def write_random_run(folder: Path, config: RunConfig) -> Path:
    """Writes the files that answering needs to a folder, and returns it."""
    components = build_components(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in components.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("{}")
    components.model.save_pretrained(folder / "model")
    components.processor(masked=dict.fromkeys(config.model.modalities, False)).save_pretrained(folder / "model")
    return folder
