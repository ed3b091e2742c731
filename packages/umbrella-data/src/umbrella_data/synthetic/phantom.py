"""Brain phantoms with a side, left or right, that shows in the spatial pattern, not in the brightness; all RAS+.

Coordinates run from -1 to 1 along each axis of the field of view: x to the right, y to anterior, z to superior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Side = Literal["left", "right"]
Array = np.ndarray

# Diffusivities of tissue and of fluid in mm2/s (Pierpaoli et al., Radiology 1996).
_TISSUE_DIFFUSIVITY, _FLUID_DIFFUSIVITY = 0.8e-3, 3.0e-3
_HEALTHY_ANISOTROPY, _DAMAGED_ANISOTROPY = 0.85, 0.15


@dataclass(frozen=True, kw_only=True)
class Head:
    """The anatomy of one subject: the fraction (X, Y, Z) of each tissue in each voxel, from 0 to 1.

    Attributes:
        axes: (3, X, Y, Z), the coordinates of each voxel relative to the subject's centre.
        scalp: The outer shell; a dark skull is between it and the brain.
        grey: Folded cortex.
        white: White matter inside of the cortex.
        fluid: The two lateral ventricles.
    """

    axes: Array
    scalp: Array
    grey: Array
    white: Array
    fluid: Array

    @property
    def brain(self) -> Array:
        """Grey matter, white matter and fluid."""
        return np.asarray(self.grey + self.white + self.fluid)


def draw_head(rng: np.random.Generator, *, size: int) -> Head:
    """Draw a subject's anatomy on a cubic grid of `size` voxels."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    centre = rng.uniform(-0.03, 0.03, 3)
    axes = np.stack(np.meshgrid(*(line - shift for shift in centre), indexing="ij")).astype(np.float32)
    scale = rng.uniform(0.95, 1.05, 3)
    edge = 2.0 / size
    outer = _ellipsoid(axes, np.array([0.78, 0.92, 0.84]) * scale, edge)
    skull = _ellipsoid(axes, np.array([0.72, 0.86, 0.78]) * scale, edge)
    brain = _ellipsoid(axes, np.array([0.66, 0.80, 0.72]) * scale, edge)
    phases = rng.uniform(0, 2 * np.pi, 3)
    folds = sum(np.sin(9 * axis + phase) for axis, phase in zip(axes, phases, strict=True))
    core = _ellipsoid(axes, np.array([0.52, 0.66, 0.58]) * scale, edge, bulge=0.05 * folds)
    width = rng.uniform(0.07, 0.09)
    fluid = sum(
        _ellipsoid(axes - np.array([sign * 0.13, 0, 0.05]).reshape(3, 1, 1, 1), np.array([width, 0.3, 0.16]), edge)
        for sign in (-1, 1)
    )
    fluid = np.minimum(fluid, core)
    return Head(axes=axes, scalp=outer - skull, grey=brain - core, white=core - fluid, fluid=fluid)


def draw_t1(rng: np.random.Generator, *, size: int, side: Side) -> Array:
    """A T1-weighted volume (X, Y, Z) with one bright lesion on the given side."""
    head = draw_head(rng, size=size)
    scalp, grey, white, fluid = np.array([0.55, 0.55, 0.8, 0.2]) * rng.uniform(0.9, 1.1, 4)
    volume = scalp * head.scalp + grey * head.grey + white * head.white + fluid * head.fluid
    centre = _sign(side) * rng.uniform(0.3, 0.4), rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2)
    volume = volume + 1.2 * _blob(head.axes, centre, 0.2) * head.brain
    volume = volume * (1 + 0.1 * np.tensordot(rng.uniform(-1, 1, 3), head.axes, axes=1))
    return _magnitude(rng, volume, noise=0.04)


def draw_bold(rng: np.random.Generator, *, size: int, num_frames: int, first: Side) -> Array:
    """A BOLD series (X, Y, Z, T): one hemisphere is active in the first half, the other one in the second.

    The mean over time is the same for both answers. The amplitude is far above that of real BOLD, so that a small
    model learns it in minutes.
    """
    head = draw_head(rng, size=size)
    grey, white, fluid = np.array([0.8, 0.65, 0.9]) * rng.uniform(0.95, 1.05, 3)
    still = 0.15 * head.scalp + grey * head.grey + white * head.white + fluid * head.fluid
    frames = np.arange(num_frames)
    series = np.repeat(still[..., None], num_frames, axis=3)
    y, z = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    for sign, moment in ((_sign(first), 0.29), (-_sign(first), 0.71)):
        region = _blob(head.axes, (sign * rng.uniform(0.3, 0.4), y, z), 0.22) * head.brain
        peak = moment * (num_frames - 1) + rng.uniform(-0.5, 0.5)
        course = np.exp(-0.5 * ((frames - peak) / (0.13 * num_frames)) ** 2)
        series += region[..., None] * course
    series *= 1 + 0.02 * rng.standard_normal(num_frames)
    return _magnitude(rng, series, noise=0.04)


def draw_dwi(rng: np.random.Generator, *, size: int, b_values: Array, directions: Array, side: Side) -> Array:
    """A diffusion-weighted series (X, Y, Z, N) with lower fibre anisotropy in one hemisphere.

    Mean diffusivity is the same on both sides.

    Args:
        rng: Random generator.
        size: Voxels along each axis.
        b_values: (N,) in s/mm2.
        directions: (N, 3) unit vectors in RAS world coordinates.
        side: The side with the lower anisotropy.
    """
    head = draw_head(rng, size=size)
    x, _, z = head.axes
    # Fibres run from back to front in the hemispheres, and from left to right between them.
    bridge = np.exp(-((x / 0.2) ** 2) - (z / 0.25) ** 2)
    tilt = rng.uniform(-0.2, 0.2)
    fibres = np.stack([bridge, 1 - bridge, tilt * (1 - bridge)])
    fibres /= np.linalg.norm(fibres, axis=0)
    damaged = 1 / (1 + np.exp(-_sign(side) * x / 0.04))
    order = _HEALTHY_ANISOTROPY + (_DAMAGED_ANISOTROPY - _HEALTHY_ANISOTROPY) * damaged
    # With diffusivities l along and m across the fibre, the mean (l + 2 m) / 3 is constant and `order` is (l - m) / l.
    along = 3 * _TISSUE_DIFFUSIVITY / (1 + 2 * (1 - order))
    across = along * (1 - order)
    grey, white, fluid, scalp = np.array([0.9, 0.7, 1.3, 0.15]) * rng.uniform(0.95, 1.05, 4)
    still = grey * head.grey + scalp * head.scalp
    series = np.empty((*x.shape, len(b_values)), dtype=np.float32)
    for volume, (b, direction) in enumerate(zip(b_values, directions, strict=True)):
        cosine = np.tensordot(direction, fibres, axes=1)
        attenuated = white * head.white * np.exp(-b * (across + (along - across) * cosine**2))
        series[..., volume] = (
            attenuated + still * np.exp(-b * _TISSUE_DIFFUSIVITY) + fluid * head.fluid * np.exp(-b * _FLUID_DIFFUSIVITY)
        )
    return _magnitude(rng, series, noise=0.015)


def _sign(side: Side) -> int:
    return 1 if side == "right" else -1


def _ellipsoid(axes: Array, radii: Array, edge: float, *, bulge: Array | float = 0.0) -> Array:
    """An ellipsoid with soft edges: voxels on its border are partly inside."""
    radius = np.sqrt(np.tensordot(1 / np.square(radii), np.square(axes), axes=1))
    inside = (1 + bulge - radius) * float(radii.min())
    return np.asarray(np.clip(inside / edge + 0.5, 0, 1), dtype=np.float32)


def _blob(axes: Array, centre: tuple[float, float, float], width: float) -> Array:
    distance = np.square(axes - np.array(centre, dtype=np.float32).reshape(3, 1, 1, 1)).sum(axis=0)
    return np.asarray(np.exp(-distance / (2 * width**2)))


def _magnitude(rng: np.random.Generator, signal: Array, *, noise: float) -> Array:
    """The magnitude of the signal with complex noise, which is Rician."""
    real = signal + noise * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = noise * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.asarray(np.hypot(real, imaginary), dtype=np.float32)
