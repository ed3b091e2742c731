"""How `bench_step.py` and `bench_patch_embed.py` measure: turns, peak memory, and the operations that a step needs."""

from __future__ import annotations

import argparse
import json
import os
import statistics
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

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


def check_equal(losses: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> None:
    """All contenders that fit into memory compute the same loss, or the comparison means nothing."""
    values: dict[str, float] = {}
    for name, loss in losses.items():
        with within_memory(f"{name}, forward"):
            values[name] = float(loss().detach())
    if values and max(values.values()) - min(values.values()) > (0.05 if options.dtype == "bfloat16" else 1e-3):
        raise SystemExit(f"the losses differ: {values}")


@contextmanager
def within_memory(name: str) -> Iterator[None]:
    """What does not fit into a GPU's memory is left out, and that is said."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{name}: out of memory, left out", flush=True)
        torch.cuda.empty_cache()


def ratio(results: dict[str, tuple[float, float]], name: str, *, to: str) -> float | None:
    """How many times as long `name` takes as `to`; None where one of them was left out."""
    return results[name][0] / results[to][0] if name in results and to in results else None


def take_turns(steps: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of each, and the most memory in GiB that it takes; one turn comes first for memory alone.

    A contender that does not fit into a GPU's memory is left out, and that is said.
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
    return {name: (statistics.median(seconds[name]), most) for name, most in memory.items()}


def write_figures(path: Path | None, settings: dict[str, Any], figures: Any) -> None:
    """The figures so far: called after each, so that a run that breaks keeps those it has."""
    if path is not None:
        shown = {key: str(value) for key, value in settings.items() if key != "json"}
        path.write_text(json.dumps({"settings": shown, "figures": figures}, indent=2) + "\n")


def peak_memory(run: Callable[[], None], *, device: str) -> float:
    """GiB: on a GPU all that is allocated, weights included; on a CPU what a step allocates beyond what was there."""
    if device == "cuda":
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
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def count_flops(model: UmbrellaForConditionalGeneration, samples: list[Batch]) -> float:
    """Operations of a forward and backward, by the formula at the top of this file."""
    weights: dict[str, int] = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    learns: dict[str, bool] = {}
    for part, _, parameter in named_part_parameters(model):
        learns[part] = learns.get(part, False) or parameter.requires_grad
        if part in weights and parameter.ndim == 2:
            weights[part] += parameter.numel()
    vision, text = model.config.vision_config, model.config.text_config
    before_vision = learns["patch_embed"]
    before_projector = before_vision or learns["vision_tower"]
    before_text = before_projector or learns["projector"] or learns["embeddings"]
    total = 0.0
    for sample in samples:
        config, length = model.config.patch_embeds[sample["modality"]], len(sample["input_ids"])
        patches, tokens = config.num_patches, config.num_tokens
        embed = 2.0 * config.patch_elements * vision.hidden_size * patches
        total += embed * (1 + learns["patch_embed"])
        total += _linear(weights["vision_tower"] * patches, before=before_vision, learns=learns["vision_tower"])
        attended = 4.0 * patches**2 * vision.hidden_size * vision.num_hidden_layers
        total += attended * (3 if before_projector else 1)
        total += _linear(weights["projector"] * tokens, before=before_projector, learns=learns["projector"])
        total += _linear(weights["language_model"] * length, before=before_text, learns=learns["language_model"])
        total += 2.0 * length**2 * text.hidden_size * text.num_hidden_layers * (3 if before_text else 1)
        head = text.vocab_size * text.hidden_size * NUM_SUPERVISED
        total += _linear(head, before=before_text or learns["language_model"], learns=learns["embeddings"])
    return total


def _linear(products: float, *, before: bool, learns: bool) -> float:
    return 2.0 * products * (1 + before + learns)


def find_peak(options: argparse.Namespace) -> float:
    """TFLOP/s: of the card by its name, or of a large matrix product here and now."""
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        for card, peak in PEAK_TFLOPS.items():
            if card in name and options.dtype == "bfloat16":
                return peak
    side = 8192 if options.device == "cuda" else 2048
    matrix = torch.randn(side, side, device=options.device, dtype=getattr(torch, options.dtype))
    best, _ = take_turns({"": lambda: (matrix @ matrix, None)[1]}, options)[""]
    return 2.0 * side**3 / best / 1e12
