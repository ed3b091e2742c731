"""Patch embeds, forward and backward: a matrix product over unfolded patches against `nn.Conv3d`, on equal weights.

    uv run python tools/bench_patch_embed.py        # T1 and rsfMRI, float32 and bfloat16, width 1152
    uv run python tools/bench_patch_embed.py --device cuda --batch-size 32
    uv run python tools/bench_patch_embed.py --image-size 32 --patch-size 8 --width 64 --repeats 3    # a dry run

Both take turns, and medians are compared: what else the machine does then hits both alike. A series goes through
`Conv3d` with the frames of a patch as channels, laid out for it beforehand at no charge. Outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from umbrella_model import PatchEmbedConfig
from umbrella_model.patch_embed import PatchEmbed, build_patch_embed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRAMES, FRAMES_A_PATCH = 24, 3


def main() -> None:
    """Run all cases and print a table."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}  python {platform.python_version()}  {device_name(options.device)}")
    print(f"{'case':<30}{'Conv3d':>12}{'matmul':>12}{'ratio':>9}")
    figures = {}
    for modality in options.modalities:
        for dtype in options.dtypes:
            conv, matmul = compare(modality, DTYPES[dtype], options)
            name = f"{modality} {dtype}"
            print(f"{name:<30}{1000 * conv:>9.1f} ms{1000 * matmul:>9.1f} ms{conv / matmul:>8.2f}x", flush=True)
            figures[name] = {"conv3d_ms": 1000 * conv, "matmul_ms": 1000 * matmul, "ratio": conv / matmul}
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "figures": figures}, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modalities", nargs="+", choices=("T1", "rsfMRI"), default=["T1", "rsfMRI"])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--image-size", type=int, default=96, help="voxels along X, Y and Z")
    parser.add_argument("--patch-size", type=int, default=16, help="voxels of a patch along X, Y and Z")
    parser.add_argument("--width", type=int, default=1152, help="width of a token (SigLIP so400m: 1152)")
    parser.add_argument("--batch-size", type=int, default=2, help="scans a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    return parser.parse_args()


def device_name(device: str) -> str:
    """What is measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in facts]
    return f"CPU, {torch.get_num_threads()} threads, bfloat16 units: {', '.join(has) or 'none'}"


def compare(modality: str, dtype: torch.dtype, options: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a step of both, after a check that they compute the same."""
    torch.manual_seed(0)
    space, patch = (options.image_size,) * 3, (options.patch_size,) * 3
    if modality == "rsfMRI":
        config = PatchEmbedConfig((*space, FRAMES), (*patch, FRAMES_A_PATCH))
    else:
        config = PatchEmbedConfig(space, patch)
    ours = build_patch_embed(config, hidden_size=options.width).to(options.device, dtype)
    volumes = torch.randn(options.batch_size, 1, *config.image_size, device=options.device, dtype=dtype)
    conv, channels_first = as_conv3d(ours, volumes)
    with torch.no_grad():
        expected = ours.proj(ours.patchify(volumes))
        theirs = tokens_of(conv(channels_first), num_scans=options.batch_size)
        difference = ((theirs - expected).norm() / expected.norm()).item()
    # Dense, as it comes from an encoder. That of a plain `sum()` has strides of 0, for which torch has no fast bfloat16
    # product on every CPU.
    gradient = torch.randn_like(expected)
    if difference > (0.02 if dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{modality}: the two differ by {difference:.1e}")
    steps = [
        lambda: step(conv, lambda: tokens_of(conv(channels_first), num_scans=options.batch_size), gradient),
        lambda: step(ours, lambda: ours.proj(ours.patchify(volumes)), gradient),
    ]
    first, second = take_turns(steps, repeats=options.repeats, device=options.device)
    return first, second


def as_conv3d(patch_embed: PatchEmbed, volumes: Tensor) -> tuple[nn.Conv3d, Tensor]:
    """`Conv3d` with the same weights, and the volumes as it takes them: of a series each window of frames is a scan."""
    patch = patch_embed.config.patch_size
    weight = patch_embed.proj.weight.detach().reshape(-1, 1, *patch)
    if patch_embed.config.is_series:
        weight = weight.permute(0, 1, 5, 2, 3, 4).flatten(1, 2)
        windows = volumes.unflatten(-1, (-1, patch[3])).permute(0, 5, 1, 6, 2, 3, 4)
        volumes = windows.flatten(2, 3).flatten(0, 1).contiguous()
    kernel = (patch[0], patch[1], patch[2])
    conv = nn.Conv3d(weight.shape[1], len(weight), kernel_size=kernel, stride=kernel)
    conv.to(weight.device, weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(patch_embed.proj.bias)
    return conv, volumes


def tokens_of(maps: Tensor, *, num_scans: int) -> Tensor:
    """Feature maps (N, H, x, y, z) to tokens in the order of the patch embed, time fastest."""
    tokens = maps.flatten(2).transpose(1, 2).unflatten(0, (num_scans, -1))
    return tokens.transpose(1, 2).flatten(1, 2)


def step(module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor) -> None:
    """Forward and backward of the weights; volumes need no gradient."""
    module.zero_grad(set_to_none=True)
    forward().backward(gradient)


def take_turns(steps: list[Callable[[], None]], *, repeats: int, device: str) -> list[float]:
    """Median seconds of each, after one unmeasured turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for place, run in enumerate(steps):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if turn:
                seconds[place].append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
