"""Benchmark of training steps, compared with Hugging Face's LLaVA and a merge loop on the same weights and data.

    uv run python tools/bench_step.py                                         # small widths, real numbers of tokens
    uv run python tools/bench_step.py --device cuda --size 0.5b --batch-size 32
    uv run python tools/bench_step.py --size text --sections mixed             # large language model, small tower
    uv run python tools/bench_step.py --size tiny --batch-size 2 --pool 4 --repeats 1         # a dry run

A step is forward and backward; the optimiser step is the same for all and not included. The variants of a section
alternate, after a check that their losses are equal, and medians are compared. Sections:

    T1, rsfMRI   one scan and 100 words per sample, 24 of them supervised, with each preset of trainable parts
    mixed        samples of 250 to 2,344 tokens: by length and packed, against random batches of 8 with dynamic padding
    logits       memory of the logits with a vocabulary of 151,936: at all positions, and at supervised positions

MFU is the number of floating point operations of the step / (seconds * peak), without padding and recomputation:

    linear layers    2 * weights * tokens in forward; the same in backward for the gradient of the input if any earlier
                     parameter is trainable, and the same for the gradient of the weights if they are trainable
    attention        4 * length^2 * width per layer in forward (half of it if causal), twice that in backward

The peak is the dense bfloat16 rate of a known GPU, or else the measured rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from step_data import NUM_SUPERVISED, NUM_WORDS, batch_plans, collate, make_sample, mixed_samples, scans_in_order
from step_measure import check_equal, count_flops, find_peak, ratio, time_alternately, write_figures
from step_models import SIZES, VOCABULARY, Batch, build_llava, build_model, merge_loop_loss
from umbrella_model import UmbrellaForConditionalGeneration, set_trainable


def main() -> None:
    """Run the sections and print a table."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = options.peak_tflops or find_peak(options)
    print(
        f"torch {torch.__version__}  transformers {transformers.__version__}  python {platform.python_version()}  "
        f"{options.device}, {options.dtype}, size {options.size}, {options.clock} time; peak {peak:.3g} TFLOP/s",
        flush=True,
    )
    figures: list[dict[str, Any]] = []
    failed = []
    for section in options.sections:
        try:
            for figure in SECTIONS[section](section, options, peak):
                print("  ".join(f"{key} {_format(value)}" for key, value in figure.items()), flush=True)
                figures.append(figure)
                write_figures(options.json, vars(options), figures)
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
    parser.add_argument("--batch-size", type=int, default=4, help="samples per step in the T1 and rsfMRI sections")
    parser.add_argument("--pool", type=int, default=32, help="samples of the mixed section")
    parser.add_argument("--series-share", type=float, default=0.25, help="share of them with an rsfMRI series")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a shared machine")
    parser.add_argument("--peak-tflops", type=float, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def one_modality(modality: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:
    """Our step, Hugging Face's forward and the merge loop, on samples of one modality."""
    for preset in options.presets:
        model = build_model(options)
        set_trainable(model, preset)
        llava = build_llava(model, modality)
        samples = [make_sample(model, modality, num_words=NUM_WORDS, seed=i) for i in range(options.batch_size)]
        padded = collate(samples, options)
        ours = collate(samples, options, packed=options.device == "cuda")
        volumes = padded["pixel_values"][modality]
        theirs = {key: padded[key] for key in ("input_ids", "attention_mask", "labels")}
        losses: dict[str, Callable[[], Tensor]] = {
            "ours": lambda m=model, b=ours: _our_loss(m, b),  # type: ignore[misc]
            "HF LLaVA": lambda m=llava, b=theirs, v=volumes: m(**b, pixel_values=v).loss,  # type: ignore[misc]
            "merge loop": lambda m=llava, b=theirs, v=volumes: merge_loop_loss(m, b, v),  # type: ignore[misc]
        }
        check_equal(losses, options)
        flops = count_flops(model, samples)
        num_tokens = sum(len(sample["input_ids"]) for sample in samples)
        results = time_alternately({name: _step(loss) for name, loss in losses.items()}, options)
        for name, (seconds, memory) in results.items():
            yield {
                "section": modality, "preset": preset, "step": name, "ms": 1000 * seconds,
                "tokens/s": num_tokens / seconds, "MFU": flops / seconds / peak / 1e12, "peak GiB": memory,
                "ours is faster by": ratio(results, name, to="ours"),
            }  # fmt: skip


def _our_loss(model: UmbrellaForConditionalGeneration, batch: Batch) -> Tensor:
    out = model(**batch)
    loss: Tensor = out.loss
    for term in (out.dummy_terms or {}).values():
        loss = loss + 1e-7 * term
    return loss


def _step(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


def mixed(section: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:
    """All samples once: in random batches of 8 (also by the merge loop), by length with a token budget, and packed."""
    model = build_model(options)
    llava = build_llava(model, None)
    samples = mixed_samples(model, options)
    num_tokens = sum(len(sample["input_ids"]) for sample in samples)
    plans = batch_plans(samples, options)
    flops = count_flops(model, samples)
    steps = {name: _epoch(model, batches, is_packed=name == "packed") for name, batches in plans.items()}
    random_batches = plans["random batches of 8"]

    def merge_loop() -> None:
        for batch in random_batches:
            llava.zero_grad(set_to_none=True)
            merge_loop_loss(llava, batch, scans_in_order(batch, model)).backward()

    results = time_alternately(steps | {"merge loop, random batches of 8": merge_loop}, options)
    for name, (seconds, memory) in results.items():
        yield {
            "section": section, "batches": name, "ms": 1000 * seconds, "useful tokens/s": num_tokens / seconds,
            "useful": num_tokens / sum(batch["input_ids"].numel() for batch in plans.get(name, random_batches)),
            "MFU": flops / seconds / peak / 1e12, "peak GiB": memory,
            "faster than random by": ratio(results, "random batches of 8", to=name),
        }  # fmt: skip


def _epoch(model: UmbrellaForConditionalGeneration, batches: list[Batch], *, is_packed: bool) -> Callable[[], None]:
    def run() -> None:
        model.set_attn_implementation("varlen" if is_packed else "sdpa")
        for batch in batches:
            model.zero_grad(set_to_none=True)
            _our_loss(model, batch).backward()

    return run


def logits(section: str, options: argparse.Namespace, peak: float) -> Iterable[dict[str, Any]]:  # noqa: ARG001
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


SECTIONS: dict[str, Callable[[str, argparse.Namespace, float], Iterable[dict[str, Any]]]] = {
    "T1": one_modality,
    "rsfMRI": one_modality,
    "mixed": mixed,
    "logits": logits,
}


if __name__ == "__main__":
    main()
