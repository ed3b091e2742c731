"""Measures how far an absent modality's patch embed moves: `uv run python tools/drift_table.py`.

Each row steps the T1 patch embed of a model with random gradients while T1 is present, and with the dummy gradient
while it is absent. The drift is what the trainer logs as `drift/T1`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, SiglipVisionConfig
from transformers.optimization import Adafactor

from umbrella_model import PatchEmbedConfig, UmbrellaConfig
from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.dummy_loss.drift_monitor import DriftWatch
from umbrella_train.dummy_loss.loss import DummyLoss

REAL_NORM = 0.01
AFTER = (10, 100, 1000)
Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# Name, learning rate, constructor with the settings of Hugging Face's Trainer, and most steps without the modality: a
# step of Muon takes long on a CPU.
OPTIMIZERS: list[tuple[str, float, Build, int]] = [
    ("AdamW", 5e-5, lambda each: torch.optim.AdamW(each, lr=5e-5, weight_decay=0.0), 1000),
    ("AdamW", 1e-3, lambda each: torch.optim.AdamW(each, lr=1e-3, weight_decay=0.0), 1000),
    ("SGD", 0.01, lambda each: torch.optim.SGD(each, lr=0.01), 1000),
    ("Adafactor", 5e-5, lambda each: Adafactor(each, lr=5e-5, scale_parameter=False, relative_step=False), 1000),
    ("Muon", 5e-5, lambda each: torch.optim.Muon([p for p in each if p.ndim == 2], lr=5e-5, weight_decay=0.0), 100),
]


def build_tower(hidden_size: int) -> UmbrellaVisionTower:
    """A tower with one small encoder layer and a T1 patch embed for patches of 8 x 8 x 8 voxels."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "intermediate_size": 8, "num_attention_heads": 1}
    return UmbrellaVisionTower(
        UmbrellaConfig(
            modalities={"T1": PatchEmbedConfig((48, 48, 48), (8, 8, 8))},
            vision_config=SiglipVisionConfig(num_hidden_layers=1, **sizes),
            text_config=Qwen2Config(num_hidden_layers=1, num_key_value_heads=1, vocab_size=16, **sizes),
            image_token_index=15,
        )
    )


def measure(build: Build, *, num_seen: int, after: Iterable[int], scale: float, hidden_size: int) -> list[float]:
    """Drift in standard deviations after numbers of steps without the modality.

    Args:
        build: Constructs the optimizer.
        num_seen: Steps with the modality before these.
        after: The numbers of steps, ascending.
        scale: Of the dummy loss.
        hidden_size: Of the patch embed.
    """
    tower = build_tower(hidden_size)
    parameters = list(tower.patch_embed("T1").parameters())
    count = sum(parameter.numel() for parameter in parameters)
    optimizer, watch = build(parameters), DriftWatch(tower)
    dummy = DummyLoss(scale=scale).weight("T1") / math.sqrt(count)
    drift = []
    last = max(after)
    for step in range(num_seen + last):
        is_seen = step < num_seen
        for parameter in parameters:
            real = torch.randn_like(parameter) * (REAL_NORM / math.sqrt(count)) if is_seen else None
            parameter.grad = torch.full_like(parameter, dummy) if real is None else real
        watch.before_step(frozenset({"T1"} if is_seen else ()), step=step)
        optimizer.step()
        if step + 1 - num_seen in after:
            drift.append(watch.measure(step=step + 1)["drift/T1"])
    return drift


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1e-7, help="of the dummy loss")
    parser.add_argument("--num-seen", type=int, default=50, help="steps with the modality, for half of the rows")
    parser.add_argument("--hidden-size", type=int, default=1152)
    options = parser.parse_args()
    print(f"torch {torch.__version__}\n")
    print("| optimizer | learning rate | before | " + " | ".join(f"{steps:,} steps absent" for steps in AFTER) + " |")
    print("|---|---|---|" + "--:|" * len(AFTER))
    for name, learning_rate, build, most in OPTIMIZERS:
        for num_seen in (0, options.num_seen):
            after = [steps for steps in AFTER if steps <= most]
            drift = measure(build, num_seen=num_seen, after=after, scale=options.scale, hidden_size=options.hidden_size)
            cells = [f"{100 * value:.2g} %" for value in drift] + ["–"] * (len(AFTER) - len(after))
            seen = f"{num_seen} steps" if num_seen else "never seen"
            print(f"| {name} | {learning_rate:g} | {seen} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
