"""Benchmark of reading scans, compared with MONAI's usual pipeline and plain nibabel, on synthetic files.

    uv run python tools/bench_data.py                  # everything, a few minutes
    uv run python tools/bench_data.py --sections t1    # one section
    uv run python tools/bench_data.py --json out.json  # the same figures as JSON

The variants of a section alternate on one thread, and medians are compared, so that other load on the machine affects
all of them. The scans are synthetic heads with noise; their compression ratio is printed, because it determines the
cost of decompression.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# One thread for all variants; has to be set before numpy and torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import torch

from umbrella_data.pipeline.config import Interpolation, PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.scan import gzip_stream
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan.volume import load_volume

# The type annotations of nibabel and MONAI are not accurate.
load: Any = nib.load
monai_transforms: Any = importlib.import_module("monai.transforms")
PACKAGES = ("umbrella-data", "torch", "monai", "nibabel", "numpy", "isal", "indexed-gzip")
Variants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        section: The comparison that it belongs to.
        name: The measured variant.
        value: Median, in `unit`.
        unit: `ms`.
        ratio: Speedup over the section's first variant; None for the first one.
    """

    section: str
    name: str
    value: float
    unit: str
    ratio: float | None


def main() -> None:
    """Run the sections and print a table."""
    options = parse_options()
    torch.set_num_threads(1)
    versions = {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}
    print("  ".join(f"{name} {number}" for name, number in versions.items()))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for section in options.sections:
            for figure in SECTIONS[section](Path(folder), options):
                print(format_line(figure), flush=True)
                figures.append(figure)
    if options.json is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "folder")}
        content = {"versions": versions, "settings": settings, "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis of the T1")
    parser.add_argument("--image-size", type=int, default=96, help="voxels along each axis of the result")
    parser.add_argument("--frame-size", type=int, default=96, help="voxels along each axis of the series")
    parser.add_argument("--frames", type=int, default=200, help="frames of the series")
    parser.add_argument("--window", type=int, default=24, help="frames of a window, from the middle")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="parent of the temporary folder for scans")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    return parser.parse_args()


def version_of(package: str) -> str:
    """Version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def format_line(figure: Figure) -> str:
    """A figure as a line of the table."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:6.1f} x"
    return f"{figure.section:<8}{figure.name:<58}{figure.value:9.1f} {figure.unit}{ratio}"


def compare(section: str, variants: Variants, *, repeats: int) -> list[Figure]:
    """Time the variants alternately, after one untimed run of each; the first one is the baseline."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians))
    return [
        Figure(section, name, value, "ms", None if name == first else medians[first] / value)
        for name, value in medians.items()
    ]


@contextmanager
def inflating_with(library: object) -> Iterator[None]:
    """Decompress with another library inside the context."""
    before = gzip_stream.inflate
    gzip_stream.inflate = library
    try:
        yield
    finally:
        gzip_stream.inflate = before


def head(size: int, *, seed: int) -> np.ndarray:
    """A synthetic int16 head (X, Y, Z) on an empty background: smooth tissue, a bright shell and noise."""
    rng = np.random.default_rng(seed)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x, y, z = np.meshgrid(line, line, line, indexing="ij", sparse=True)
    radius = np.sqrt((x / 0.62) ** 2 + (y / 0.78) ** 2 + (z / 0.7) ** 2)
    phases = rng.uniform(0, 2 * np.pi, 3)
    folds = np.sin(25 * x + phases[0]) + np.sin(23 * y + phases[1]) + np.sin(27 * z + phases[2])
    tissue = 400 + 60 * folds + 250 * (np.abs(radius - 0.93) < 0.04)
    noise = 12 * rng.standard_normal((size, size, size), dtype=np.float32)
    return np.where(radius < 1, np.abs(tissue + noise), 0).round().astype(np.int16)


def image_of(voxels: np.ndarray) -> nib.Nifti1Image:
    """A NIfTI image in RAS+ with 1 mm voxels and a repetition time of 1 s."""
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    return image


def bench_t1(folder: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """From a T1 file to a normalised tensor: each interpolation, with ISA-L and with zlib."""
    path = folder / "t1.nii.gz"
    nib.save(image_of(head(options.size, seed=0)), path)
    print(f"T1 {options.size}^3 int16: compressed to {path.stat().st_size / (2 * options.size**3):.0%}")
    image_size = (options.image_size,) * 3
    interpolations: tuple[Interpolation, ...] = ("area", "trilinear")
    for interpolation in interpolations:
        monai = monai_transforms.Compose(
            [
                monai_transforms.LoadImage(image_only=True),
                monai_transforms.EnsureChannelFirst(),
                monai_transforms.Resize(image_size, mode=interpolation),
                monai_transforms.NormalizeIntensity(),
            ]
        )
        config = PipelineConfig(image_size=image_size, interpolation=interpolation, normalise="zscore")
        ours = Pipeline(config, modality="T1")

        def plain(mode: str = interpolation) -> torch.Tensor:
            voxels = torch.from_numpy(load(path).get_fdata(dtype=np.float32))
            small = torch.nn.functional.interpolate(voxels[None, None], size=image_size, mode=mode)[0]
            return (small - small.mean()) / small.std()

        def with_zlib(pipeline: Pipeline = ours) -> torch.Tensor:
            with inflating_with(zlib):
                return pipeline(path, generator=None)

        variants: Variants = {
            f"MONAI, {interpolation}": lambda monai=monai: monai(path),  # type: ignore[misc]
            f"nibabel and torch, {interpolation}": plain,
            f"umbrella_data, zlib, {interpolation}": with_zlib,
        }
        if gzip_stream.inflate is not zlib:
            variants[f"umbrella_data, ISA-L, {interpolation}"] = lambda ours=ours: ours(path, generator=None)  # type: ignore[misc]
        yield from compare("T1", variants, repeats=options.repeats)
        difference = np.abs(np.asarray(monai(path)) - ours(path, generator=None).numpy()).max()
        print(f"largest difference from MONAI, {interpolation}: {difference:.1e}")


def bench_windows(folder: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """A window from the middle of a series: streamed, with a saved index, and from an uncompressed file."""
    frame = head(options.frame_size, seed=1)
    rng = np.random.default_rng(2)
    series = np.empty((*frame.shape, options.frames), dtype=np.int16, order="F")
    for index in range(options.frames):
        series[..., index] = frame + (frame > 0) * rng.integers(-8, 9, frame.shape, dtype=np.int16)
    plain, packed, index_folder = folder / "bold.nii", folder / "bold.nii.gz", folder / "index"
    for path in (plain, packed):
        nib.save(image_of(series), path)
    print(f"series {series.shape} int16: compressed to {packed.stat().st_size / series.nbytes:.0%}")
    del series
    first = (options.frames - options.window) // 2
    window = (first, options.window)

    def ours(path: Path, *, index: Path | None = None, is_verified: bool = True) -> torch.Tensor:
        if not is_verified:
            scan_file.forget_verified()
        return load_volume(path, modality="rsfMRI", window=window, index_folder=index).data

    def fdata(path: Path) -> np.ndarray:
        return np.asarray(load(path).get_fdata()[..., first : first + options.window])

    def sliced(path: Path) -> np.ndarray:
        return np.asarray(load(path).dataobj[..., first : first + options.window])

    start = time.perf_counter()
    ours(packed, index=index_folder)
    seconds = time.perf_counter() - start
    saved = sum(path.stat().st_size for path in index_folder.rglob("*.gzindex"))
    print(f"index built with the first window in {seconds:.1f} s; {saved / 2**20:.1f} MB on disk")
    same = np.array_equal(ours(packed, index=index_folder)[0].numpy(), fdata(plain).astype(np.float32))
    print(f"the window equals nibabel's: {same}")
    yield from compare(
        "window",
        {
            ".nii.gz, get_fdata()[window]": lambda: fdata(packed),
            ".nii.gz, dataobj[window]": lambda: sliced(packed),
            ".nii.gz, umbrella_data, first time (verifies the file)": lambda: ours(packed, is_verified=False),
            ".nii.gz, umbrella_data, streamed": lambda: ours(packed),
            ".nii.gz, umbrella_data, saved index": lambda: ours(packed, index=index_folder),
        },
        repeats=options.repeats,
    )
    yield from compare(
        "window",
        {
            ".nii, get_fdata()[window]": lambda: fdata(plain),
            ".nii, dataobj[window]": lambda: sliced(plain),
            ".nii, umbrella_data": lambda: ours(plain),
        },
        repeats=options.repeats,
    )


SECTIONS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Figure]]] = {
    "t1": bench_t1,
    "windows": bench_windows,
}

if __name__ == "__main__":
    main()
