"""How fast scans are read: against MONAI's usual pipeline and against plain nibabel, on files made for the purpose.

    uv run python tools/bench_data.py                  # everything, a few minutes
    uv run python tools/bench_data.py --sections t1    # one section
    uv run python tools/bench_data.py --json out.json  # the same figures for machines

All contenders of a section take turns, on one thread, and medians are compared: what else the machine does then hits
all of them alike. The scans are heads with noise; how well they compress is printed, for it decides what gunzip costs.
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

# One thread for everybody, set before numpy and torch are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
import torch

from umbrella_data.pipeline.config import Interpolation, PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.scan import gzip_stream
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan.volume import load_volume

# nibabel's and MONAI's classes are not what their types say.
load: Any = nib.load
monai_transforms: Any = importlib.import_module("monai.transforms")
PACKAGES = ("umbrella-data", "torch", "monai", "nibabel", "numpy", "isal", "indexed-gzip")
Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        section: Which comparison it belongs to.
        name: What was measured.
        value: Median, in the unit.
        unit: `ms`.
        ratio: How many times faster than the section's first line; None for that line.
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
                print(line_of(figure), flush=True)
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
    parser.add_argument("--folder", type=Path, default=None, help="where the scans are made (default: the system's)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    return parser.parse_args()


def version_of(package: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def line_of(figure: Figure) -> str:
    """A figure as a line of the table."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:6.1f} x"
    return f"{figure.section:<8}{figure.name:<58}{figure.value:9.1f} {figure.unit}{ratio}"


def compare(section: str, contenders: Contenders, *, repeats: int) -> list[Figure]:
    """Let all contenders take turns, after one unmeasured turn each; the first one is the measure."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
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
    """Read `.nii.gz` with another library for a while."""
    before = gzip_stream.inflate
    gzip_stream.inflate = library
    try:
        yield
    finally:
        gzip_stream.inflate = before


def head(size: int, *, seed: int) -> np.ndarray:
    """An int16 head (X, Y, Z) on an empty background: smooth tissue, a bright shell, noise."""
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
    """An image in RAS+, 1 mm, 1 s from frame to frame."""
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    return image


def bench_t1(folder: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """A T1 to a normalised tensor: each interpolation, with ISA-L and with zlib."""
    path = folder / "t1.nii.gz"
    nib.save(image_of(head(options.size, seed=0)), path)
    print(f"T1 {options.size}^3 int16: gzip keeps {path.stat().st_size / (2 * options.size**3):.0%}")
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

        contenders: Contenders = {
            f"MONAI, {interpolation}": lambda monai=monai: monai(path),  # type: ignore[misc]
            f"nibabel and torch, {interpolation}": plain,
            f"umbrella_data, zlib, {interpolation}": with_zlib,
        }
        if gzip_stream.inflate is not zlib:
            contenders[f"umbrella_data, ISA-L, {interpolation}"] = lambda ours=ours: ours(path, generator=None)  # type: ignore[misc]
        yield from compare("T1", contenders, repeats=options.repeats)
        difference = np.abs(np.asarray(monai(path)) - ours(path, generator=None).numpy()).max()
        print(f"largest difference between MONAI's result and ours, {interpolation}: {difference:.1e}")


def bench_windows(folder: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """A window from the middle of a series: streamed, through a saved index, and from a file that is not compressed."""
    frame = head(options.frame_size, seed=1)
    rng = np.random.default_rng(2)
    series = np.empty((*frame.shape, options.frames), dtype=np.int16, order="F")
    for index in range(options.frames):
        series[..., index] = frame + (frame > 0) * rng.integers(-8, 9, frame.shape, dtype=np.int16)
    plain, packed, index_folder = folder / "bold.nii", folder / "bold.nii.gz", folder / "index"
    for path in (plain, packed):
        nib.save(image_of(series), path)
    print(f"series {series.shape} int16: gzip keeps {packed.stat().st_size / series.nbytes:.0%}")
    del series
    first = (options.frames - options.window) // 2
    window = (first, options.window)

    def ours(path: Path, *, index: Path | None = None, is_known: bool = True) -> torch.Tensor:
        if not is_known:
            scan_file.forget_verified()
        return load_volume(path, modality="rsfMRI", window=window, index_folder=index).data

    def fdata(path: Path) -> np.ndarray:
        return np.asarray(load(path).get_fdata()[..., first : first + options.window])

    def sliced(path: Path) -> np.ndarray:
        return np.asarray(load(path).dataobj[..., first : first + options.window])

    start = time.perf_counter()
    ours(packed, index=index_folder)
    made = time.perf_counter() - start
    saved = sum(path.stat().st_size for path in index_folder.rglob("*.gzindex"))
    print(f"index made with the first window in {made:.1f} s; {saved / 2**20:.1f} MB on disk")
    same = np.array_equal(ours(packed, index=index_folder)[0].numpy(), fdata(plain).astype(np.float32))
    print(f"the window is nibabel's, voxel by voxel: {same}")
    yield from compare(
        "window",
        {
            ".nii.gz, get_fdata()[window]": lambda: fdata(packed),
            ".nii.gz, dataobj[window]": lambda: sliced(packed),
            ".nii.gz, umbrella_data, first time (proves the file)": lambda: ours(packed, is_known=False),
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
