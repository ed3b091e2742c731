"""The table of a dry run: trainable parameters, tokens per scan, and time and memory of two steps."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbrella_model import UmbrellaForConditionalGeneration, parameter_table

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class StepCosts(TrainerCallback):
    """Logs loss, time and peak memory after every step of a dry run."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        self._start = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Called by the Trainer after every step, after its loss was read and the device has finished."""
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = time.perf_counter() - self._start
            logger.info(
                "step %d: loss %.4f, %.2f s, peak memory %s", state.global_step, logs["loss"], seconds, _peak_memory()
            )


def describe_model(model: UmbrellaForConditionalGeneration) -> str:
    """A table of the parts of the model with their trainable parameters, and of the tokens per scan."""
    lines = [f"{'part':<24}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{row.part:<24}{row.num_parameters:>16,}{row.num_trainable:>16,}" for row in parameter_table(model)]
    lines += ["", f"{'modality':<24}{'tokens per scan':>16}"]
    lines += [f"{name:<24}{model.num_image_tokens(name):>16,}" for name in model.config.patch_embeds]
    return "\n".join(lines)


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    if resource is None:
        return "unknown"
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process"
