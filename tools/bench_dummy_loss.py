"""Cost of the dummy loss per training step: `uv run python tools/bench_dummy_loss.py --size toy`.

Every round takes one step of each variant on the same T1-only batch, in rotating order. The table has medians of the
step time, and medians and quartiles of its ratio to the first variant in the same round. Variants:

    off          one process without dummy terms: absent patch embeds have no gradient, and the optimiser skips them
    find_unused  on several ranks instead of `off`: DDP with find_unused_parameters=True, without dummy terms
    update       the dummy loss with its defaults
    hold         the same, with the gradients of absent patch embeds cleared before the optimiser step

All variants use one model. When the DDP settings change, the model is wrapped again and two steps are not timed: in the
first DDP creates its buckets, and in the second it rebuilds them in the order in which gradients became ready (not with
find_unused_parameters), which allocates 2 GB for the large model.

The added work of the dummy loss is also timed separately, 30 times, for cases where the variation between steps is
larger than its cost.

On a shared machine use `--clock cpu`, which counts CPU time of this process instead of wall time; with
OMP_NUM_THREADS=1 it hardly depends on other load.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, SiglipVisionConfig

from step_measure import write_figure
from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train import DummyLoss

IMAGE_TOKEN = 5
NUM_WORDS = 100


def build_model(size: str) -> UmbrellaForConditionalGeneration:
    """A model with random weights: `toy`, or as llava-interleave-qwen-0.5b (SigLIP so400m and Qwen2 0.5B)."""
    torch.manual_seed(0)
    if size == "toy":
        grid, patch, frames = (32, 32, 32), (8, 8, 8), 4
        vision = SiglipVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
        text = Qwen2Config(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1000,
        )
    else:
        grid, patch, frames = (96, 96, 96), (16, 16, 16), 24
        vision = SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
        )
        text = Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
            tie_word_embeddings=True,
        )
    modalities = {
        "T1": PatchEmbedConfig(grid, patch),
        "rsfMRI": PatchEmbedConfig((*grid, frames), (*patch, 3 if frames == 24 else 2)),
        "dMRI": PatchEmbedConfig(grid, patch, in_channels=2),
    }
    config = UmbrellaConfig(
        modalities=modalities,
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=size != "toy",
    )
    return UmbrellaForConditionalGeneration(config)


def build_batch(model: Any, *, batch_size: int, device: torch.device) -> dict[str, Any]:
    """A T1-only batch: one scan and 100 words per sample, the last 24 of them supervised."""
    length = model.num_image_tokens("T1")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 900, (batch_size, length + NUM_WORDS), generator=generator)
    ids[:, :length] = IMAGE_TOKEN
    labels = torch.full_like(ids, -100)
    labels[:, -24:] = ids[:, -24:]
    tags = torch.zeros_like(ids)
    tags[:, :length] = 1
    scans = torch.randn(batch_size, 1, *model.config.patch_embeds["T1"].image_size, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "modality_ids": tags}
    dtype = next(model.parameters()).dtype
    return {
        **{name: tensor.to(device) for name, tensor in batch.items()},
        "pixel_values": {"T1": scans.to(device, dtype)},
    }


@dataclass(frozen=True)
class Variant:
    """Settings of a training step.

    Attributes:
        with_terms: Whether absent modalities have a dummy term.
        is_held: Whether their gradients are cleared before the optimiser step.
        find_unused: DDP's `find_unused_parameters`; None without DDP.
    """

    with_terms: bool = False
    is_held: bool = False
    find_unused: bool | None = None


ONE_PROCESS = {"off": Variant(), "update": Variant(with_terms=True), "hold": Variant(with_terms=True, is_held=True)}
SEVERAL_RANKS = {
    "find_unused": Variant(find_unused=True),
    "update": Variant(with_terms=True, find_unused=False),
    "hold": Variant(with_terms=True, is_held=True, find_unused=False),
}


class Stepper:
    """Trains one model with any of the variants.

    Args:
        model: The model, not wrapped.
        batch: A batch on the model's device.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, model: UmbrellaForConditionalGeneration, batch: dict[str, Any], *, clock: Callable[[], float]
    ) -> None:
        self._model, self._batch, self._clock = model, batch, clock
        self._device = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        tower = model.model.vision_tower
        self._absent: list[Any] = [tower.patch_embed(name) for name in tower.modality_order if name != "T1"]
        self._wrapped: nn.Module = model
        self._find_unused: bool | None = None

    def time_step(self, variant: Variant) -> float:
        """Seconds of forward, backward and optimiser step, including the device's work."""
        for embed in self._absent:
            # Without terms, their sums are not computed either.
            embed.forward = type(embed).forward.__get__(embed) if variant.with_terms else lambda _scans: None
        if variant.find_unused != self._find_unused:
            self._wrap(variant.find_unused)
            self._step(variant)
            self._step(variant)
        self._wait()
        start = self._clock()
        self._step(variant)
        self._wait()
        return self._clock() - start

    def time_added_work(self, *, is_held: bool) -> float:
        """Seconds that the dummy loss adds to a step: terms, their backward, and the optimiser step of the absent."""
        for embed in self._absent:
            embed.forward = type(embed).forward.__get__(embed)
        self._wait()
        start = self._clock()
        DummyLoss()({str(number): embed(None) for number, embed in enumerate(self._absent)}).backward()
        if not is_held:
            self._optimizer.step()  # skips parameters without a gradient
        self._optimizer.zero_grad()
        self._wait()
        return self._clock() - start

    def _wrap(self, find_unused: bool | None) -> None:
        self._wrapped = self._model
        gc.collect()  # removes the hooks of the old wrapper
        ids = [self._device.index] if self._device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            self._model, device_ids=ids, find_unused_parameters=bool(find_unused), gradient_as_bucket_view=True
        )
        self._find_unused = find_unused

    def _step(self, variant: Variant) -> None:
        out = self._wrapped(**self._batch)
        loss: Tensor = out.loss
        if variant.with_terms:
            loss = loss + DummyLoss()(out.dummy_terms)
        loss.backward()
        if variant.is_held:
            for embed in self._absent:
                for parameter in embed.parameters():
                    parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(stepper: Stepper, variants: dict[str, Variant], *, pairs: int) -> dict[str, list[float]]:
    """Seconds of every step by variant, in the order of the rounds."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pairs + 2):
        rotated = names[number % len(names) :] + names[: number % len(names)]
        for name in rotated:
            seconds = stepper.time_step(variants[name])
            if number >= 2:  # two rounds of warm-up
                times[name].append(seconds)
    return times


def main() -> None:
    """Run the benchmark and print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=["toy", "0.5b"], default="toy")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, default=None, help="append the figures to this file, as lines of JSON")
    options = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with device:  # a GPU draws random weights in much less time than a CPU
        model: Any = build_model(options.size)
    model = model.to(getattr(torch, options.dtype)).train()
    batch = build_batch(model, batch_size=options.batch_size, device=device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    variants = SEVERAL_RANKS if dist.is_initialized() else ONE_PROCESS
    stepper = Stepper(model, batch, clock=clock)
    times = measure(stepper, variants, pairs=options.pairs)
    added = {
        name: median([stepper.time_added_work(is_held=name == "hold") for _ in range(30)])
        for name in ("update", "hold")
    }
    if rank == 0:
        first, *_ = times
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        print(
            f"{options.size}, {options.dtype}, {options.batch_size} T1 samples, {ranks} rank(s), {device_name}, "
            f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.clock} time, "
            f"{options.pairs} rounds"
        )
        for name, seconds in times.items():
            ratios = [one / base for one, base in zip(seconds, times[first], strict=True)]
            low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            print(f"{name:<12} {1000 * median(seconds):9.1f} ms   {middle:6.3f} ({low:.3f} to {high:.3f}) of {first}")
            figure = {"step": name, "ms": 1000 * median(seconds), f"ratio to {first}": middle, "quartiles": [low, high]}
            write_figure(options.json, figure, options)
        for name, added_seconds in added.items():
            share = 100 * added_seconds / median(times[first])
            print(f"{name}, added work only: {1000 * added_seconds:.1f} ms, {share:.2f} % of {first}")
            figure = {"step": f"{name}, added work only", "ms": 1000 * added_seconds, f"% of {first}": share}
            write_figure(options.json, figure, options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
