"""Measures how far the dummy loss moves a patch embed without scans: `uv run python tools/drift_table.py`.

Every row trains the same elements in float64 three times: with the dummy gradient, with gradients of zero (`scale: 0`),
and without gradients (`hold`). The distance to the second run is the effect of the dummy gradient, which the trainer
forecasts; the distance to the third also includes momentum that continues while the modality is absent.

All elements of a patch embed get the same dummy gradient, scale / sqrt(N) or, with `sum`, scale, so that a subset
represents all N. Muon normalises whole matrices: it is measured on a matrix of full size, in float32 and for fewer
steps.
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
class Row:
    """One row: optimiser, number of elements, interval between steps with the modality (0: never), and reduction."""

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


def measure(row: Row, *, elements: int) -> tuple[float, float]:
    """Mean distance to a run with gradients of zero, and to a run without gradients."""
    ends = [_run(row, gradient, elements=elements) for gradient in (row.norm, 0.0, None)]
    against_zeros, against_none = ((ends[0] - other).abs().mean().item() for other in ends[1:])
    return against_zeros, against_none


def _run(row: Row, norm: float | None, *, elements: int) -> torch.Tensor:
    weights, optimizer = _build(row, elements=elements)
    generator = torch.Generator().manual_seed(0)
    for step in range(row.steps):
        if row.is_seen(step):
            real = torch.randn(weights.shape, dtype=weights.dtype, generator=generator)
            weights.grad = real * REAL_NORM / math.sqrt(row.count)
        else:
            weights.grad = None if norm is None else torch.full_like(weights, norm / math.sqrt(row.count))
        optimizer.step()
    return weights.detach()


def forecast(row: Row) -> float | None:
    """The drift according to `DriftForecast`; None if it does not support the optimiser."""
    if row.optimizer == "Muon":
        return None
    rules = {
        "AdamW": OptimizerFacts(),
        "SGD": OptimizerFacts("sgd", beta1=0.9),
        "Adafactor": OptimizerFacts("adafactor"),
    }
    facts = rules[row.optimizer]
    drift = DriftForecast(num_elements=row.count, gradient_norm=row.norm, optimizer=facts)
    for step in range(row.steps):
        seen = REAL_NORM if row.is_seen(step) else None
        drift.step(learning_rate=row.learning_rate, real_norm=seen)
    return drift.total


def _build(row: Row, *, elements: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if row.optimizer == "Muon":
        weights = torch.nn.Parameter(torch.randn(SIZES[row.count]) * INITIAL_STD)
        return weights, torch.optim.Muon([weights], lr=row.learning_rate, weight_decay=0.0)
    weights = torch.nn.Parameter(torch.randn(elements // 50, 50, dtype=torch.float64) * INITIAL_STD)
    if row.optimizer == "Adafactor":
        # The settings of Hugging Face's Trainer.
        return weights, Adafactor([weights], lr=row.learning_rate, scale_parameter=False, relative_step=False)
    if row.optimizer == "SGD":
        return weights, torch.optim.SGD([weights], lr=row.learning_rate, momentum=0.9)
    return weights, torch.optim.AdamW([weights], lr=row.learning_rate, weight_decay=0.0)


def rows(*, steps: int, muon_steps: int, sizes: list[int]) -> Iterator[Row]:
    """All rows of the table."""
    for optimizer, learning_rate in (("AdamW", 5e-5), ("SGD", 0.01), ("Adafactor", 5e-5), ("Muon", 5e-5)):
        if optimizer == "Muon" and (not hasattr(torch.optim, "Muon") or not muon_steps):
            continue
        for count in sizes:
            if optimizer == "Muon" and count > 1_000_000:
                continue  # minutes per step on a CPU
            for every in (0, 10, 50):
                for policy in ("unit", "sum"):
                    length = muon_steps if optimizer == "Muon" else steps
                    yield Row(optimizer, count, every, policy, learning_rate, length)


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--muon-steps", type=int, default=100, help="0 omits Muon")
    parser.add_argument("--elements", type=int, default=20_000, help="size of the subset that is trained")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}; drift in per cent of an initial standard deviation of {INITIAL_STD}\n")
    print("| optimiser | learning rate | steps | N | modality seen | reduction | drift | forecast | against hold |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(steps=options.steps, muon_steps=options.muon_steps, sizes=options.sizes):
        seen = f"1 step in {row.every}" if row.every else "never"
        expected = forecast(row)
        forecast_text = "–" if expected is None else f"{100 * expected / INITIAL_STD:.3g} %"
        measured, against_hold = (100 * value / INITIAL_STD for value in measure(row, elements=options.elements))
        print(
            f"| {row.optimizer} | {row.learning_rate:g} | {row.steps} | {row.count:.0e} | {seen} | {row.policy} "
            f"| {measured:.3g} % | {forecast_text} | {against_hold:.3g} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
