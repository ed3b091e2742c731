"""Benchmark of training steps, compared with Hugging Face's LLaVA and a merge loop on the same weights and data.

    uv run python tools/bench_step.py                                         # small widths, real numbers of tokens
    uv run python tools/bench_step.py --device cuda --size 0.5b --batch-size 32
    uv run python tools/bench_step.py --size text --sections mixed             # large language model, small tower
    uv run python tools/bench_step.py --size tiny --batch-size 2 --pool 4 --repeats 1         # a dry run

A step is forward and backward; the optimiser step is the same for all and not included. The variants of a section
alternate, after a check that their losses are equal, and medians are compared. Sections:

    T1, rsfMRI   one scan and 100 words per sample, 24 of them supervised
    mixed        samples of 250 to 2,344 tokens: by length and packed, against random batches of 8 with dynamic padding
    logits       memory of the logits with a vocabulary of 151,936: at all positions, and at supervised positions

All but `logits` run once for each preset of trainable parts. With `--ours-only`, memory includes no other model.

MFU is the number of floating point operations of the step / (seconds * peak), without padding and recomputation. It is
that of PaLM (Chowdhery et al. 2022, appendix B), except that causal attention is halved and frozen parts count less:

    linear layers    2 * weights * tokens in forward; the same in backward for the gradient of the input if any earlier
                     parameter is trainable, and the same for the gradient of the weights if they are trainable
    attention        4 * length^2 * width per layer in forward (half of it if causal), twice that in backward

The peak is the dense bfloat16 rate of the GPU in NVIDIA's data sheet; without it (another GPU, float32), MFU is left
out. On a CPU it is the measured rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from step_data import NUM_SUPERVISED, NUM_WORDS, batch_plans, collate, make_sample, mixed_samples, scans_in_order
from step_measure import check_equal, count_flops, find_peak, ratio, time_alternately, write_figure
from step_models import SIZES, VOCABULARY, Batch, build_llava, build_model, merge_loop_loss
from umbrella_model import UmbrellaForConditionalGeneration, set_trainable
from umbrella_train.assembly.acceleration import compile_layers


def main() -> None:
    """Run the sections and print a table."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = options.peak_tflops or find_peak(options)
    known_peak = "unknown" if peak is None else f"{peak:.3g} TFLOP/s"
    print(
        f"torch {torch.__version__}  transformers {transformers.__version__}  python {platform.python_version()}  "
        f"{options.device}, {options.dtype}, size {options.size}, {options.clock} time; peak {known_peak}",
        flush=True,
    )
    failed = []
    for section in options.sections:
        try:
            for figure in SECTIONS[section](section, options, peak):
                print("  ".join(f"{key} {_format(value)}" for key, value in figure.items()), flush=True)
                write_figure(options.json, figure, options)
        except torch.OutOfMemoryError as error:
            print(f"{section}: out of memory, the rest of the section is skipped: {error}", flush=True)
            failed.append(section)
        torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"out of memory: {', '.join(failed)}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--size", choices=tuple(SIZES), default="toy")
    parser.add_argument("--presets", nargs="+", default=["full", "align", "patch_embed_only"])
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[4], help="samples per step of the T1 and of the rsfMRI section"
    )
    parser.add_argument("--ours-only", action="store_true", help="without Hugging Face's LLaVA and the merge loop")
    parser.add_argument("--compile", default=None, help="also time our model with layers compiled by this backend")
    parser.add_argument("--pool", type=int, default=32, help="samples of the mixed section")
    parser.add_argument("--series-share", type=float, default=0.25, help="share of them with an rsfMRI series")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a shared machine")
    parser.add_argument("--peak-tflops", type=float, default=None)
    parser.add_argument("--json", type=Path, default=None, help="append the figures to this file, as lines of JSON")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    return None if peak is None else flops / seconds / peak / 1e12


def one_modality(modality: str, options: argparse.Namespace, peak: float | None) -> Iterable[dict[str, Any]]:
    """Our step, Hugging Face's forward and the merge loop, on samples of one modality."""
    for preset in options.presets:
        model = build_model(options)
        set_trainable(model, preset)
        batch_size = options.batch_size[-1 if modality == "rsfMRI" else 0]
        samples = [make_sample(model, modality, num_words=NUM_WORDS, seed=i) for i in range(batch_size)]
        ours = collate(samples, options, packed=options.device == "cuda")
        losses: dict[str, Callable[[], Tensor]] = {"ours": partial(_our_loss, model, ours)}
        if options.compile:
            compiled = copy.deepcopy(model)
            compile_layers(compiled, backend=options.compile)
            losses["ours, compiled"] = partial(_our_loss, compiled, ours)
        if not options.ours_only:
            losses |= _other_losses(build_llava(model, modality), collate(samples, options), modality)
        check_equal(losses, options)
        flops = count_flops(model, samples)
        num_tokens = sum(len(sample["input_ids"]) for sample in samples)
        results = time_alternately({name: _step(loss) for name, loss in losses.items()}, options)
        for name, (seconds, memory) in results.items():
            yield {
                "section": modality, "preset": preset, "batch size": batch_size, "step": name, "ms": 1000 * seconds,
                "tokens/s": num_tokens / seconds, "TFLOP": flops / 1e12, "MFU": _mfu(flops, seconds, peak),
                "peak GiB": memory,
                "ours is faster by": ratio(results, name, to="ours"),
            }  # fmt: skip


def _other_losses(
    llava: LlavaForConditionalGeneration, padded: Batch, modality: str
) -> dict[str, Callable[[], Tensor]]:
    volumes = padded["pixel_values"][modality]
    batch = {key: padded[key] for key in ("input_ids", "attention_mask", "labels")}
    return {
        "HF LLaVA": lambda: llava(**batch, pixel_values=volumes).loss,
        "merge loop": lambda: merge_loop_loss(llava, batch, volumes),
    }


def _our_loss(model: UmbrellaForConditionalGeneration, batch: Batch) -> Tensor:
    out = model(**batch)
    loss: Tensor = out.loss
    for term in (out.dummy_terms or {}).values():
        loss = loss + 1e-7 * term
    return loss


def _step(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def mixed(section: str, options: argparse.Namespace, peak: float | None) -> Iterable[dict[str, Any]]:
    """All samples once: in random batches of 8 (also by the merge loop), by length with a token budget, and packed."""
    for preset in options.presets:
        model = build_model(options)
        set_trainable(model, preset)
        samples = mixed_samples(model, options)
        num_tokens = sum(len(sample["input_ids"]) for sample in samples)
        plans = batch_plans(samples, options)
        flops = count_flops(model, samples)
        steps = {name: _epoch(model, batches, is_packed=name == "packed") for name, batches in plans.items()}
        random_batches = plans["random batches of 8"]
        if not options.ours_only:
            steps["merge loop, random batches of 8"] = _merge_loop_epoch(model, random_batches)
        results = time_alternately(steps, options)
        for name, (seconds, memory) in results.items():
            yield {
                "section": section, "preset": preset, "batches": name, "ms": 1000 * seconds,
                "useful tokens/s": num_tokens / seconds,
                "useful": num_tokens / sum(batch["input_ids"].numel() for batch in plans.get(name, random_batches)),
                "TFLOP": flops / 1e12, "MFU": _mfu(flops, seconds, peak), "peak GiB": memory,
                "faster than random by": ratio(results, "random batches of 8", to=name),
            }  # fmt: skip


def _merge_loop_epoch(model: UmbrellaForConditionalGeneration, batches: list[Batch]) -> Callable[[], None]:
    llava = build_llava(model, None)

    def run() -> None:
        for batch in batches:
            llava.zero_grad(set_to_none=True)
            merge_loop_loss(llava, batch, scans_in_order(batch, model)).backward()

    return run


def _epoch(model: UmbrellaForConditionalGeneration, batches: list[Batch], *, is_packed: bool) -> Callable[[], None]:
    def run() -> None:
        model.set_attn_implementation("varlen" if is_packed else "sdpa")
        for batch in batches:
            model.zero_grad(set_to_none=True)
            _our_loss(model, batch).backward()

    return run


def logits(section: str, options: argparse.Namespace, peak: float | None) -> Iterable[dict[str, Any]]:  # noqa: ARG001
    """Head and loss of T1 samples: at all positions, and at supervised positions."""
    model = build_model(options)
    width = model.config.text_config.hidden_size
    dtype = getattr(torch, options.dtype)
    head = nn.Linear(width, VOCABULARY, bias=False).to(options.device, dtype)
    sample = make_sample(model, "T1", num_words=NUM_WORDS, seed=0)
    length = len(sample["input_ids"])
    for name, positions in (("all positions", length), ("supervised positions", NUM_SUPERVISED)):
        hidden = torch.randn(positions, width, device=options.device, dtype=dtype, requires_grad=True)
        targets = torch.randint(VOCABULARY, (positions,), device=options.device)
        outputs: list[Tensor] = []

        def run(h: Tensor = hidden, t: Tensor = targets, outputs: list[Tensor] = outputs) -> None:
            out = head(h)
            outputs[:] = [out.detach()]
            F.cross_entropy(out.float(), t).backward()

        results = time_alternately({name: run}, options)
        if name not in results:
            continue
        seconds, memory = results[name]
        size = outputs[0].numel() * outputs[0].element_size() / 2**20
        yield {"section": section, "logits": name, "ms": 1000 * seconds, "MiB per sample": size, "peak GiB": memory}


SECTIONS: dict[str, Callable[[str, argparse.Namespace, float | None], Iterable[dict[str, Any]]]] = {
    "T1": one_modality,
    "rsfMRI": one_modality,
    "mixed": mixed,
    "logits": logits,
}


if __name__ == "__main__":
    main()
