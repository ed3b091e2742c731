"""Measures how far the dummy loss moves a patch embed that gets no scans: `uv run python tools/drift_table.py`.

Every row trains the same elements in float64 with the dummy gradient, with exact zeros in its place (`scale: 0`), and
with none, as `hold` does. The distance to the second is what the dummy gradient did, and what is forecast; the distance
to the third holds also what momentum goes on to do while the modality is away.

Elements of a patch embed are alike, so that a sample of them stands for all N: the dummy gradient of each is that of
the whole patch embed, scale / sqrt(N) or, for `sum`, scale. Muon looks at whole matrices: it steps one of that size, in
float32 and for fewer steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.optimization import Adafactor

from umbrella_train.dummy_loss.drift import DriftForecast, OptimizerFacts
from umbrella_train.dummy_loss.loss import DummyLoss

SIZES = {50_000: (200, 250), 1_000_000: (800, 1250), 10_000_000: (2000, 5000)}
REAL_NORM = 0.01
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Situation:
    """One row: who steps, how large the patch embed is, how often its modality comes, and how its term is reduced."""

    optimizer: str
    count: int
    every: int
    policy: str
    learning_rate: float
    steps: int

    @property
    def norm(self) -> float:
        """L2 norm of the dummy gradient."""
        loss = DummyLoss(reduction="sum" if self.policy == "sum" else "unit", sizes={"m": self.count})
        return loss.weight("m")

    def is_seen(self, step: int) -> bool:
        """Whether the modality is in the batch of a step."""
        return bool(self.every) and step % self.every == 0


def measure(situation: Situation, *, elements: int) -> tuple[float, float]:
    """Mean distance between the elements and those of two runs beside it: zeros for the dummy gradient, and none."""
    ends = [_run(situation, gradient, elements=elements) for gradient in (situation.norm, 0.0, None)]
    against_zeros, against_none = ((ends[0] - other).abs().mean().item() for other in ends[1:])
    return against_zeros, against_none


def _run(situation: Situation, norm: float | None, *, elements: int) -> torch.Tensor:
    weights, optimizer = _build(situation, elements=elements)
    generator = torch.Generator().manual_seed(0)
    for step in range(situation.steps):
        if situation.is_seen(step):
            real = torch.randn(weights.shape, dtype=weights.dtype, generator=generator)
            weights.grad = real * REAL_NORM / math.sqrt(situation.count)
        else:
            weights.grad = None if norm is None else torch.full_like(weights, norm / math.sqrt(situation.count))
        optimizer.step()
    return weights.detach()


def forecast(situation: Situation) -> float | None:
    """What `DriftForecast` says of the row; None where it has no rule for the optimiser."""
    if situation.optimizer == "Muon":
        return None
    rules = {
        "AdamW": OptimizerFacts(),
        "SGD": OptimizerFacts("sgd", beta1=0.9),
        "Adafactor": OptimizerFacts("adafactor"),
    }
    facts = rules[situation.optimizer]
    followed = DriftForecast(num_elements=situation.count, gradient_norm=situation.norm, optimizer=facts)
    for step in range(situation.steps):
        seen = REAL_NORM if situation.is_seen(step) else None
        followed.step(learning_rate=situation.learning_rate, real_norm=seen)
    return followed.total


def _build(situation: Situation, *, elements: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if situation.optimizer == "Muon":
        weights = torch.nn.Parameter(torch.randn(SIZES[situation.count]) * INITIAL_STD)
        return weights, torch.optim.Muon([weights], lr=situation.learning_rate, weight_decay=0.0)
    weights = torch.nn.Parameter(torch.randn(elements // 50, 50, dtype=torch.float64) * INITIAL_STD)
    if situation.optimizer == "Adafactor":
        # As Hugging Face's Trainer sets it.
        return weights, Adafactor([weights], lr=situation.learning_rate, scale_parameter=False, relative_step=False)
    if situation.optimizer == "SGD":
        return weights, torch.optim.SGD([weights], lr=situation.learning_rate, momentum=0.9)
    return weights, torch.optim.AdamW([weights], lr=situation.learning_rate, weight_decay=0.0)


def rows(*, steps: int, muon_steps: int, sizes: list[int]) -> Iterator[Situation]:
    """Every situation of the table."""
    for optimizer, learning_rate in (("AdamW", 5e-5), ("SGD", 0.01), ("Adafactor", 5e-5), ("Muon", 5e-5)):
        if optimizer == "Muon" and (not hasattr(torch.optim, "Muon") or not muon_steps):
            continue
        for count in sizes:
            if optimizer == "Muon" and count > 1_000_000:
                continue  # minutes a step on a CPU
            for every in (0, 10, 50):
                for policy in ("unit", "sum"):
                    length = muon_steps if optimizer == "Muon" else steps
                    yield Situation(optimizer, count, every, policy, learning_rate, length)


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--muon-steps", type=int, default=100, help="0 leaves Muon out")
    parser.add_argument("--elements", type=int, default=20_000, help="elements that stand for all")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}; drift in per cent of an initial standard deviation of {INITIAL_STD}\n")
    print("| optimiser | learning rate | steps | N | modality seen | reduction | drift | forecast | against hold |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(steps=options.steps, muon_steps=options.muon_steps, sizes=options.sizes):
        seen = f"1 step in {row.every}" if row.every else "never"
        expected = forecast(row)
        told = "–" if expected is None else f"{100 * expected / INITIAL_STD:.3g} %"
        measured, against_hold = (100 * value / INITIAL_STD for value in measure(row, elements=options.elements))
        print(
            f"| {row.optimizer} | {row.learning_rate:g} | {row.steps} | {row.count:.0e} | {seen} | {row.policy} "
            f"| {measured:.3g} % | {told} | {against_hold:.3g} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
