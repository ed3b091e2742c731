"""The random transforms of MONAI that `augment` accepts, with their arguments. Imports neither torch nor MONAI.

MONAI takes several seconds to import, and configurations are checked without it; a test compares this table with its
signatures. Left out are arguments that change the shape or the dtype, or that draw other parameters for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from umbrella_data.errors import did_you_mean


class Kind(NamedTuple):
    """Which values an argument takes: the end of "must be ...", and the type that pydantic checks."""

    words: str
    annotation: Any


Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class SupportedTransform:
    """A row of the table.

    Attributes:
        arguments: The kind of each argument other than `prob`.
        required: Those without a default.
        order: Two arguments with MONAI's defaults, the second of which must not be smaller; None is not compared.
        swaps: The argument with which left and right could be exchanged, or None.
    """

    arguments: Mapping[str, Kind]
    required: Sequence[str] = ()
    order: Mapping[tuple[str, str], tuple[float | None, float | None]] = field(default_factory=dict)
    swaps: Callable[[Arguments], str | None] = lambda _: None


def _sorted(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("low is above high")
    return pair


def _differ(axes: tuple[int, int]) -> tuple[int, int]:
    if axes[0] % 3 == axes[1] % 3:
        raise ValueError("twice the same axis")
    return axes


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic reads true as 1
        raise ValueError("true and false are no numbers")
    return value


def _number(**limits: Any) -> Any:
    return Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False, **limits)]


def _whole(**limits: Any) -> Any:
    return Annotated[int, BeforeValidator(_no_switch), Field(**limits)]


def _pair(number: Any) -> Any:
    return Annotated[tuple[number, number], AfterValidator(_sorted)]


def _per_axis(number: Any, *, length: int = 3) -> Any:
    return number | _listed(number | _pair(number), length=length)


def _listed(entry: Any, *, length: int) -> Any:
    return Annotated[tuple[entry, ...], Field(min_length=1, max_length=length)]


def _or_three(entry: Any) -> Any:
    return entry | tuple[entry, entry, entry]


def _one_of(*words: str) -> Kind:
    return Kind(" or ".join(words), Literal[words])


_PROB = Kind("a number from 0 to 1", _number(ge=0, le=1))
_NUMBER = Kind("a number", _number())
_NON_NEGATIVE = Kind("a number of at least 0", _number(ge=0))
_SWITCH = Kind("true or false", bool)
_SIZE = _whole(ge=1)
_COUNT = Kind("a whole number of at least 1", _SIZE)
_PAIR = Kind("[low, high]", _pair(_number()))
_POSITIVE_PAIR = Kind("[low, high], above 0", _pair(_number(gt=0)))
_NON_NEGATIVE_PAIR = Kind("[low, high] of at least 0", _pair(_number(ge=0)))
_SPREAD = Kind("a number or [low, high]", _number() | _pair(_number()))
_POSITIVE_SPREAD = Kind("a number above 0, or [low, high]", _number(gt=0) | _pair(_number(gt=0)))
_UNIT_SPREAD = Kind("a number from 0 to 1, or [low, high]", _number(ge=0, le=1) | _pair(_number(ge=0, le=1)))
_GAMMA = Kind("a number above 0.5, or [low, high] above 0", _number(gt=0.5) | _pair(_number(gt=0)))
# A whole cell of the grid at most, beyond which it would fold.
_DISTORTION = Kind("a number, or [low, high], between -1 and 1", _number(gt=-1, lt=1) | _pair(_number(gt=-1, lt=1)))
_PER_AXIS = Kind("a number, or a list with a number or [low, high] for each axis", _per_axis(_number()))
# MONAI adds 1: at -1 and below, an axis would collapse or be mirrored.
_SCALES = Kind(
    "a number below 1, or a list with a number below 1 or [low, high] above -1 for each axis",
    _number(gt=-1, lt=1) | _listed(_number(gt=-1, lt=1) | _pair(_number(gt=-1)), length=3),
)
_SHEARS = Kind(
    "a number, or a list of up to 6 numbers or [low, high], between -0.5 and 0.5",
    _per_axis(_number(gt=-0.5, lt=0.5), length=6),
)
_SIZES = Kind("a whole number of voxels, or three", _or_three(_SIZE))
_ZOOMS = Kind("a number above 0, or three", _or_three(_number(gt=0)))
_CELLS = Kind("a whole number of at least 1, or three", _or_three(_SIZE))
_POINT = _whole(ge=3)
_POINTS = Kind("a whole number of at least 3, or two", _POINT | _pair(_POINT))
_AXIS = Annotated[int, BeforeValidator(_no_switch), Field(ge=-3, le=2)]
_AXES = Kind("an axis from 0 to 2, or a list of axes", _AXIS | Annotated[tuple[_AXIS, ...], Field(min_length=1)] | None)
_AXIS_PAIR = Kind("two different axes from 0 to 2", Annotated[tuple[_AXIS, _AXIS], AfterValidator(_differ)])
_ROTATE90_AXES = (0, 1)
_ON_GRID = {"mode": _one_of("bilinear", "nearest"), "padding_mode": _one_of("zeros", "border", "reflection")}
_RESIZE_MODE = _one_of("nearest", "nearest-exact", "trilinear", "area")
_APPROX = _one_of("erf", "sampled", "scalespace")


def _largest(value: Any, position: int) -> float:
    """The largest size of a MONAI range, such as 0.1 or [0.1, [0, 0.2]], at one of its positions."""
    entries = value if isinstance(value, tuple) else () if value is None else (value,)
    entry = entries[position] if position < len(entries) else 0.0
    return max(map(abs, entry)) if isinstance(entry, tuple) else abs(entry)


def _affine_swaps(arguments: Arguments) -> str | None:
    """Whether the X axis can point to the other side: the first entry of rotation times shear is not above 0."""
    y, z = (_largest(arguments.get("rotate_range"), axis) for axis in (1, 2))
    # MONAI's shears of Y and Z along X, where the last one adds to that of Z.
    along_y, along_z, more = (_largest(arguments.get("shear_range"), place) for place in (2, 4, 5))
    kept = math.cos(y) * math.cos(z)
    is_turned = max(y, z) >= math.pi / 2
    return (
        "rotate_range"
        if is_turned or kept <= math.sqrt(1 - kept**2) * math.hypot(along_y, along_z + more * along_y)
        else None
    )


def _rotate_swaps(arguments: Arguments) -> str | None:
    # A rotation around X keeps the side.
    turns = {key: _largest((arguments.get(key, 0.0),), 0) for key in ("range_y", "range_z")}
    return next((key for key, turn in turns.items() if turn >= math.pi / 2), None)


def _flip_swaps(arguments: Arguments) -> str | None:
    axes = arguments.get("spatial_axis")  # None flips all
    listed = axes if isinstance(axes, tuple) else (0 if axes is None else axes,)
    return "spatial_axis" if any(axis % 3 == 0 for axis in listed) else None


def _rotate90_swaps(arguments: Arguments) -> str | None:
    return "spatial_axes" if any(axis % 3 == 0 for axis in arguments.get("spatial_axes", _ROTATE90_AXES)) else None


_AFFINE = {
    "rotate_range": _PER_AXIS,
    "shear_range": _SHEARS,
    "translate_range": _PER_AXIS,
    "scale_range": _SCALES,
    **_ON_GRID,
}

TRANSFORMS: Mapping[str, SupportedTransform] = {
    "RandAffine": SupportedTransform(_AFFINE, swaps=_affine_swaps),
    "Rand3DElastic": SupportedTransform(
        {"sigma_range": _POSITIVE_PAIR, "magnitude_range": _NON_NEGATIVE_PAIR, **_AFFINE},
        required=("sigma_range", "magnitude_range"),
        swaps=_affine_swaps,
    ),
    "RandGridDistortion": SupportedTransform({"num_cells": _CELLS, "distort_limit": _DISTORTION, **_ON_GRID}),
    "RandRotate": SupportedTransform({**{f"range_{axis}": _SPREAD for axis in "xyz"}, **_ON_GRID}, swaps=_rotate_swaps),
    "RandZoom": SupportedTransform(
        {"min_zoom": _ZOOMS, "max_zoom": _ZOOMS, "mode": _RESIZE_MODE, "padding_mode": _one_of("edge", "constant")},
        order={("min_zoom", "max_zoom"): (0.9, 1.1)},
    ),
    "RandFlip": SupportedTransform({"spatial_axis": _AXES}, swaps=_flip_swaps),
    "RandAxisFlip": SupportedTransform({}, swaps=lambda _: "name"),
    "RandRotate90": SupportedTransform({"max_k": _COUNT, "spatial_axes": _AXIS_PAIR}, swaps=_rotate90_swaps),
    "RandBiasField": SupportedTransform({"degree": _COUNT, "coeff_range": _PAIR}),
    "RandAdjustContrast": SupportedTransform({"gamma": _GAMMA, "invert_image": _SWITCH, "retain_stats": _SWITCH}),
    "RandScaleIntensity": SupportedTransform({"factors": _SPREAD}, required=("factors",)),
    "RandShiftIntensity": SupportedTransform({"offsets": _SPREAD, "safe": _SWITCH}, required=("offsets",)),
    "RandHistogramShift": SupportedTransform({"num_control_points": _POINTS}),
    "RandGaussianNoise": SupportedTransform({"mean": _NUMBER, "std": _NON_NEGATIVE, "sample_std": _SWITCH}),
    "RandGibbsNoise": SupportedTransform({"alpha": _UNIT_SPREAD}),
    "RandGaussianSmooth": SupportedTransform(
        {**{f"sigma_{axis}": _POSITIVE_PAIR for axis in "xyz"}, "approx": _APPROX}
    ),
    "RandGaussianSharpen": SupportedTransform(
        {
            **{f"sigma1_{axis}": _POSITIVE_PAIR for axis in "xyz"},
            **{f"sigma2_{axis}": _POSITIVE_SPREAD for axis in "xyz"},
            "alpha": _PAIR,
            "approx": _APPROX,
        }
    ),
    "RandSimulateLowResolution": SupportedTransform(
        {"downsample_mode": _RESIZE_MODE, "upsample_mode": _RESIZE_MODE, "zoom_range": _POSITIVE_PAIR}
    ),
    "RandCoarseDropout": SupportedTransform(
        {
            "holes": _COUNT,
            "spatial_size": _SIZES,
            "dropout_holes": _SWITCH,
            "fill_value": _SPREAD,
            "max_holes": _COUNT,
            "max_spatial_size": _SIZES,
        },
        required=("holes", "spatial_size"),
        order={("holes", "max_holes"): (None, None), ("spatial_size", "max_spatial_size"): (None, None)},
    ),
}
"""The supported transforms by name. Each treats all channels, here frames and maps, alike; noise differs."""


def check_arguments(name: str, given: Arguments) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check the arguments of a transform.

    Args:
        name: Of the transform.
        given: Its arguments.

    Returns:
        The valid arguments as MONAI takes them, and the problems, each with its key.
    """
    row = TRANSFORMS.get(name)
    if row is None:
        return {}, [("name", f"{name!r} is not supported{_suggest(name, TRANSFORMS)}")]
    kinds = {"prob": _PROB, **row.arguments}
    checked, problems = {}, []
    for key, value in given.items():
        if key not in kinds:
            problems.append((key, f"is not an argument of {name} here{_suggest(key, kinds)}"))
            continue
        try:
            checked[key] = TypeAdapter(kinds[key].annotation).validate_python(value)
        except ValidationError:
            problems.append((key, f"must be {kinds[key].words} (it is {value!r})"))
    problems += [(key, f"is missing: {name} needs it") for key in row.required if key not in given]
    for (low_key, high_key), defaults in row.order.items():
        low, high = checked.get(low_key, defaults[0]), checked.get(high_key, defaults[1])
        if low is not None and high is not None and not _is_ordered(low, high):
            problems.append((high_key, f"{high} is not at least {low_key} {low}, or is for other axes"))
    return checked, problems


def side_problem(name: str, arguments: Arguments) -> tuple[str, str] | None:
    """The key with which a transform could exchange left and right, and what is wrong with it; None if it cannot."""
    key = TRANSFORMS[name].swaps(arguments)
    if key is None:
        return None
    given = f" {arguments[key]}" if key in arguments else ""
    return key, (f"{name}{given} could exchange left and right; if no answer depends on the side, set "
                 "allow_left_right: true of the pipeline")  # fmt: skip


def turned_axes(name: str, arguments: Arguments) -> tuple[int, int] | None:
    """The two axes, from 0 to 2, that a transform turns by 90 degrees; their lengths must be equal."""
    if name != "RandRotate90":
        return None
    first, second = arguments.get("spatial_axes", _ROTATE90_AXES)
    return first % 3, second % 3


def _suggest(word: str, known: Mapping[str, object]) -> str:
    return did_you_mean(word, known) or f"; known are {', '.join(known)}"


def _is_ordered(low: Any, high: Any) -> bool:
    if isinstance(low, tuple) and isinstance(high, tuple):
        return all(a <= b for a, b in zip(low, high, strict=True))
    return not isinstance(low, tuple) and not isinstance(high, tuple) and bool(low <= high)
