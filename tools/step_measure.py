"""Measurements of `bench_step.py` and `bench_patch_embed.py`: time, peak memory, and floating point operations."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from step_data import NUM_SUPERVISED
from step_models import Batch
from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_model.parts import named_part_parameters

# Dense bfloat16 rates of NVIDIA's data sheets, by the name that the driver reports.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
}


def check_equal(losses: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> None:
    """Exit unless all variants that fit into memory compute the same loss."""
    values: dict[str, float] = {}
    for name, loss in losses.items():
        with within_memory(f"{name}, forward"):
            values[name] = float(loss().detach())
    if values and max(values.values()) - min(values.values()) > (0.05 if options.dtype == "bfloat16" else 1e-3):
        raise SystemExit(f"the losses differ: {values}")


@contextmanager
def within_memory(name: str) -> Iterator[None]:
    """Skip code that runs out of GPU memory, with a message."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{name}: out of memory, skipped", flush=True)
        torch.cuda.empty_cache()


def ratio(results: dict[str, tuple[float, float]], name: str, *, to: str) -> float | None:
    """Time of `name` divided by the time of `to`; None if one of them was skipped."""
    return results[name][0] / results[to][0] if name in results and to in results else None


def time_alternately(
    steps: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Median seconds and peak memory in GiB of each variant, which run alternately after one run to measure memory.

    A variant that does not fit into GPU memory is skipped, with a message.
    """
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, float] = {}
    for name, run in steps.items():
        with within_memory(name):
            memory[name] = peak_memory(run, device=options.device)
    for _ in range(options.repeats):
        for name, run in steps.items():
            if name not in memory:
                continue
            wait(options.device)
            start = clock()
            run()
            wait(options.device)
            seconds[name].append(clock() - start)
    return {name: (statistics.median(seconds[name]), peak) for name, peak in memory.items()}


def write_figure(path: Path | None, figure: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a figure as a line of JSON; called after each, so that they are kept if the run fails or is stopped."""
    if path is None:
        return
    settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
    line = {"tool": Path(sys.argv[0]).stem, **figure, "torch": torch.__version__, "settings": settings}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def peak_memory(run: Callable[[], None], *, device: str) -> float:
    """Peak memory in GiB: on a GPU of all tensors including weights; on a CPU of the allocations during the step."""
    if device == "cuda":
        run()  # the first run also loads kernels and compiles
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0)) / 2**30


def wait(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def count_flops(model: UmbrellaForConditionalGeneration, samples: list[Batch]) -> float:
    """Operations of a forward and backward, by the formula in `bench_step.py`."""
    weights: dict[str, int] = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    is_trainable: dict[str, bool] = {}
    for part, _, parameter in named_part_parameters(model):
        is_trainable[part] = is_trainable.get(part, False) or parameter.requires_grad
        if part in weights and parameter.ndim == 2:
            weights[part] += parameter.numel()
    vision, text = model.config.vision_config, model.config.text_config
    before_vision = is_trainable["patch_embed"]
    before_projector = before_vision or is_trainable["vision_tower"]
    before_text = before_projector or is_trainable["projector"] or is_trainable["embeddings"]
    total = 0.0
    for sample in samples:
        config, length = model.config.patch_embeds[sample["modality"]], len(sample["input_ids"])
        patches, tokens = config.num_patches, config.num_tokens
        embed = 2.0 * config.patch_elements * vision.hidden_size * patches
        total += embed * (1 + is_trainable["patch_embed"])
        total += _linear(
            weights["vision_tower"] * patches, before=before_vision, is_trainable=is_trainable["vision_tower"]
        )
        attended = 4.0 * patches**2 * vision.hidden_size * vision.num_hidden_layers
        total += attended * (3 if before_projector else 1)
        total += _linear(weights["projector"] * tokens, before=before_projector, is_trainable=is_trainable["projector"])
        total += _linear(
            weights["language_model"] * length, before=before_text, is_trainable=is_trainable["language_model"]
        )
        total += 2.0 * length**2 * text.hidden_size * text.num_hidden_layers * (3 if before_text else 1)
        head = text.vocab_size * text.hidden_size * NUM_SUPERVISED
        total += _linear(
            head, before=before_text or is_trainable["language_model"], is_trainable=is_trainable["embeddings"]
        )
    return total


def _linear(products: float, *, before: bool, is_trainable: bool) -> float:
    return 2.0 * products * (1 + before + is_trainable)


def find_peak(options: argparse.Namespace) -> float | None:
    """Peak TFLOP/s: of a GPU by its name, or None if it is unknown; on a CPU the rate of a large matrix product."""
    if options.device == "cuda":
        return PEAK_TFLOPS.get(torch.cuda.get_device_name()) if options.dtype == "bfloat16" else None
    side = 2048
    matrix = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.dtype))
    best, _ = time_alternately({"": lambda: (matrix @ matrix, None)[1]}, options)[""]
    return 2.0 * side**3 / best / 1e12
