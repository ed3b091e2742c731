"""Training time lost to a checkpoint, against Hugging Face's own: `uv run python tools/bench_checkpoint.py`.

Each round trains the same model with UMBRELLA's trainer and with transformers' Trainer, in turns: first steps without
a checkpoint, then as many with one after every few steps (weights, optimizer and schedule). The last two are kept, so
that rotation is included. The time beyond that of the steps, until the trainer returns, divided by the number of
checkpoints is what one costs, including what goes on in the background. The table has the medians over the rounds.

Checkpoints are written under TMPDIR: choose a disk like that of your runs. UMBRELLA's are flushed to the disk and have
an integrity manifest; Hugging Face's are neither flushed nor checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from step_data import collate, make_sample
from step_models import SIZES, build_model
from umbrella_train import UmbrellaTrainer


class Saves(TrainerCallback):
    """Saves after every few steps of the second half, and keeps the times at which steps begin.

    Args:
        first: The last step of the first half.
        every: Steps between two checkpoints.
    """

    def __init__(self, *, first: int, every: int) -> None:
        self._first, self._every = first, every
        self.begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.begins.append(time.perf_counter())

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:  # type: ignore[override]
        """Called by the Trainer."""
        done = state.global_step - self._first
        control.should_save = done > 0 and done % self._every == 1


class OneBatch:
    """A training loader with the same batch for every step."""

    batch: dict[str, Any]
    num_batches: int

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Called by the Trainer."""
        return DataLoader([self.batch] * self.num_batches, batch_size=None)  # type: ignore[arg-type]


class OurTrainer(OneBatch, UmbrellaTrainer):
    """UMBRELLA's trainer."""


class TheirTrainer(OneBatch, Trainer):
    """Hugging Face's trainer."""


def time_saves(kind: type[Any], options: argparse.Namespace, folder: Path) -> tuple[float, float, int]:
    """Train in a folder.

    Returns:
        Seconds per checkpoint, seconds per step, and bytes of a checkpoint.
    """
    model: Any = build_model(options)
    # Hugging Face's trainer has no moments of an absent modality.
    model.model.vision_tower.patch_embed("rsfMRI").requires_grad_(False)
    num_steps = options.saves * options.every
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2 * num_steps + 1,
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=options.device == "cpu",
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
    trainer = kind(model=model, args=arguments, train_dataset=[0])
    trainer.batch = collate([make_sample(model, "T1", num_words=64, seed=0)], options)
    trainer.num_batches = arguments.max_steps
    trainer.remove_callback(PrinterCallback)
    saves = Saves(first=num_steps + 1, every=options.every)
    trainer.add_callback(saves)
    trainer.train()
    end = time.perf_counter()
    # The first step allocates the moments.
    step = median(b - a for a, b in pairwise(saves.begins[1 : num_steps + 2]))
    size = sum(path.stat().st_size for path in sorted(folder.glob("checkpoint-*"))[-1].glob("*"))
    return (end - saves.begins[num_steps + 1] - num_steps * step) / options.saves, step, size


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="toy", help="architecture (toy)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints of a round (3)")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    parser.add_argument("--dtype", default="float32", help="type of the weights (float32)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float, int]]] = {"ours": [], "Hugging Face": []}
    kinds = {"ours": OurTrainer, "Hugging Face": TheirTrainer}
    for number in range(options.rounds):
        # The second of a round finds a warmer disk: take turns.
        for name in sorted(kinds, reverse=number % 2 == 1):
            with tempfile.TemporaryDirectory() as folder:
                results[name].append(time_saves(kinds[name], options, Path(folder) / "run"))
    saves = {name: median(seconds for seconds, _, _ in rounds) for name, rounds in results.items()}
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(results["ours"], results["Hugging Face"], strict=True)]
    print(f"{options.size}, {options.dtype}, {options.device}; {options.rounds} rounds of {options.saves} checkpoints")
    for name, rounds in results.items():
        step, size = median(each[1] for each in rounds), rounds[0][2]
        print(
            f"  {name:14} {1e3 * saves[name]:9.1f} ms per checkpoint of {size / 1e6:,.1f} MB, step {1e3 * step:.1f} ms"
        )
    print(f"  ratio: median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    if options.json is not None:
        figures = {"size": options.size, "seconds": saves, "ratio": median(ratios), "ratios": ratios}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    main()
