"""Benchmark of patch embeds, forward and backward: a matrix product over unfolded patches against `nn.Conv3d`.

    uv run python tools/bench_patch_embed.py        # T1 and rsfMRI, float32 and bfloat16, width 1152
    uv run python tools/bench_patch_embed.py --device cuda --batch-size 32
    uv run python tools/bench_patch_embed.py --image-size 32 --patch-size 8 --width 64 --repeats 3    # a dry run

Both have equal weights, and their outputs are compared first. They alternate, and medians are compared, so that other
load on the machine affects both. For a series the frames of a patch are the channels of `Conv3d`; this layout is
prepared outside the measurement.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from step_measure import time_alternately, within_memory, write_figure
from step_models import as_conv3d, frames_as_channels, tokens_of
from umbrella_model import PatchEmbedConfig
from umbrella_model.patch_embed import build_patch_embed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRAMES, FRAMES_A_PATCH = 24, 3


def main() -> None:
    """Run all cases and print a table."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}  python {platform.python_version()}  {device_name(options.device)}")
    print(f"{'case':<30}{'Conv3d':>12}{'matmul':>12}{'ratio':>9}")
    failed = []
    for modality in options.modalities:
        for dtype in options.dtypes:
            name = f"{modality} {dtype}"
            seconds: dict[str, float] = {}
            with within_memory(name):
                seconds = compare(modality, DTYPES[dtype], options)
            conv, matmul = (seconds.get(each) for each in ("Conv3d", "matmul"))
            if conv is None or matmul is None:
                failed.append(name)
                continue
            print(f"{name:<30}{1000 * conv:>9.1f} ms{1000 * matmul:>9.1f} ms{conv / matmul:>8.2f}x", flush=True)
            figure = {"case": name, "conv3d_ms": 1000 * conv, "matmul_ms": 1000 * matmul, "ratio": conv / matmul}
            write_figure(options.json, figure, options)
    if failed:
        raise SystemExit(f"out of memory: {', '.join(failed)}")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modalities", nargs="+", choices=("T1", "rsfMRI"), default=["T1", "rsfMRI"])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--image-size", type=int, default=96, help="voxels along X, Y and Z")
    parser.add_argument("--patch-size", type=int, default=16, help="voxels of a patch along X, Y and Z")
    parser.add_argument("--width", type=int, default=1152, help="width of a token (SigLIP so400m: 1152)")
    parser.add_argument("--batch-size", type=int, default=2, help="scans per step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, help="append the figures to this file, as lines of JSON")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a shared machine")
    return parser.parse_args()


def device_name(device: str) -> str:
    """Name of the GPU, or threads and bfloat16 units of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name in ("avx512_bf16", "amx_bf16") if name in cpuinfo]
    return f"CPU, {torch.get_num_threads()} threads, bfloat16 units: {', '.join(units) or 'none'}"


def compare(modality: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step of each variant that fits into memory, after a check that outputs are equal."""
    torch.manual_seed(0)
    space, patch = (options.image_size,) * 3, (options.patch_size,) * 3
    if modality == "rsfMRI":
        config = PatchEmbedConfig((*space, FRAMES), (*patch, FRAMES_A_PATCH))
    else:
        config = PatchEmbedConfig(space, patch)
    ours = build_patch_embed(config, hidden_size=options.width).to(options.device, dtype)
    volumes = torch.randn(options.batch_size, 1, *config.image_size, device=options.device, dtype=dtype)
    conv, channels_first = as_conv3d(ours), volumes
    if config.is_series:
        channels_first = frames_as_channels(volumes, FRAMES_A_PATCH).contiguous()
    with torch.no_grad():
        expected = ours.proj(ours.patchify(volumes))
        theirs = tokens_of(conv(channels_first), num_scans=options.batch_size)
        difference = ((theirs - expected).norm() / expected.norm()).item()
    # Dense, as from an encoder. The gradient of a plain `sum()` has strides of 0, for which torch lacks a fast bfloat16
    # product on some CPUs.
    gradient = torch.randn_like(expected)
    if difference > (0.02 if dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{modality}: outputs of Conv3d and matmul differ by {difference:.1e}")
    steps: dict[str, Callable[[], None]] = {
        "Conv3d": lambda: step(conv, lambda: tokens_of(conv(channels_first), num_scans=options.batch_size), gradient),
        "matmul": lambda: step(ours, lambda: ours.proj(ours.patchify(volumes)), gradient),
    }
    return {name: seconds for name, (seconds, _) in time_alternately(steps, options).items()}


def step(module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor) -> None:
    """One forward and backward; volumes need no gradient."""
    module.zero_grad(set_to_none=True)
    forward().backward(gradient)


if __name__ == "__main__":
    main()
