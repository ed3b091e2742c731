"""Settings of a pipeline and of its augmentation. Imports no torch, since training configurations include them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from umbrella_data.pipeline.random_transforms import check_arguments, side_problem, turned_axes
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_ACCEPTED_B, MAX_B, NonFinite, check_b_limits

Interpolation = Literal["trilinear", "area"]
"""How the field of view is resized.

- `trilinear`: each new voxel is interpolated between two old ones along each axis.
- `area`: each new voxel is the mean of the old ones that it covers, as in `torch.nn.functional.adaptive_avg_pool3d`.
"""

Normalisation = Literal["foreground_zscore", "temporal_zscore", "zscore", "nonzero_zscore"]
"""How intensities are normalised.

- `foreground_zscore`: each channel minus the foreground's mean, over its standard deviation.
- `zscore`: each channel minus its mean over all voxels, over their standard deviation, as in MONAI's
  `NormalizeIntensity(channel_wise=True)`.
- `nonzero_zscore`: the same over the voxels that are not 0, which stay 0, as with its `nonzero=True`.
- `temporal_zscore`: each voxel minus its own mean over time, over the foreground's standard deviation: only the
  fluctuation is left (series only).
"""


Crop = Literal["field_of_view", "mask", "foreground"]
"""What the model's box is centred on, if `spacing` is given.

- `field_of_view`: the centre of the scan.
- `mask`: the middle of the voxels in the scan's brain mask that are not 0; a scan without a mask is rejected.
- `foreground`: the middle of the voxels above the mean of the first frame, or of those that are not 0 in a masked scan;
  the first frame is read twice, or the middle one if the first is empty.
"""


MAX_REMOVED = 0.01
"""A box outside of which there is a larger fraction of the mask or foreground gives the warning `cropped`."""


class AugmentConfig(BaseModel):
    """A preset of random changes of a training scan, drawn from the sample's own generator."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    flip_left_right: bool = False
    """Mirror half of the scans: only where the answer does not depend on the side."""
    max_shift: float = Field(default=0.03, ge=0, le=0.25)
    """Largest shift along each axis, as a fraction of the field of view."""
    max_rotation: float = Field(default=5.0, ge=0, le=45)
    """Largest rotation around each axis, in degrees."""
    max_intensity_scale: float = Field(default=0.1, ge=0, lt=1)
    """Largest relative change of contrast."""
    noise_std: NonNegativeFloat = 0.05
    """Standard deviation of Gaussian noise, in units of the normalised scan."""


class RandomTransform(BaseModel):
    """A random array transform of MONAI with its arguments, as in `{name: RandGaussianNoise, prob: 0.2, std: 0.05}`.

    Its other keys are MONAI's arguments, with MONAI's defaults; `umbrella_data.pipeline.random_transforms` lists them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """The name of the transform."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The given arguments as MONAI takes them."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _check(cls, entry: Any) -> Any:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            return entry  # pydantic reports it
        arguments, problems = check_arguments(entry["name"], {key: entry[key] for key in entry if key != "name"})
        if problems:
            raise _errors([((key,), text) for key, text in problems])
        return {"name": entry["name"], **arguments}


_TRANSFORM_LIST = TypeAdapter(tuple[RandomTransform, ...])


def _errors(problems: Sequence[tuple[tuple[str | int, ...], str]]) -> ValidationError:
    """One error for several problems, each with its path below the value."""
    return ValidationError.from_exception_data(
        "augment",
        [InitErrorDetails(type=PydanticCustomError("value_error", "{text}", {"text": text}), loc=loc, input=None)
         for loc, text in problems],
    )  # fmt: skip


def _preset_or_list(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate as what it is; the errors of a union would list those of each member, with other paths."""
    if isinstance(value, Mapping):
        return AugmentConfig.model_validate(value)
    if isinstance(value, list | tuple):
        return _TRANSFORM_LIST.validate_python(value)
    if value is None or isinstance(value, AugmentConfig):
        return validate(value)
    raise ValueError(f"is {value!r}; write the keys of the preset, such as {{}}, or a list of transforms")


Augment = AugmentConfig | tuple[RandomTransform, ...] | None


class PipelineSettings(BaseModel):
    """How scans of one modality become the model's input; the image size is the model's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Voxel size in mm to resample to, then crop or pad (default: the whole field of view, resized)."""
    interpolation: Interpolation = "trilinear"
    """How the field of view is resized: trilinear, or area, where a new voxel is the mean of those that it covers."""
    crop: Crop = "field_of_view"
    """With spacing, what the model's box is centred on: the field_of_view, the brain mask, or the foreground."""
    normalise: Normalisation = "foreground_zscore"
    """Over which voxels: foreground_zscore, zscore (all), nonzero_zscore; temporal_zscore: each one over time."""
    non_finite: NonFinite = "outside_mask"
    """NaN and infinite voxels: reject the scan, read those outside_mask as 0 (others: reject), or read all as zero."""
    short_series: Literal["raise", "pad"] = "raise"
    """What to do with a series shorter than the window of frames."""
    window_seconds: PositiveFloat | None = None
    """Seconds that the frames of a series cover, interpolated over time: one repetition time for all series."""
    max_b: float = Field(default=MAX_B, gt=0, le=MAX_ACCEPTED_B)
    """The tensor of a DWI is fitted on b0 and the shells up to this b-value (s/mm2), else on the lowest shell."""
    b0_threshold: float = Field(default=B0_THRESHOLD, ge=0, le=MAX_ACCEPTED_B)
    """Volumes of a DWI with a b-value up to this (s/mm2) are b0 volumes."""
    allow_left_right: bool = False
    """Transforms in augment may exchange left and right: only where no answer depends on the side."""
    augment: Annotated[Augment, WrapValidator(_preset_or_list)] = None
    """Augmentation of training scans (default: none): a preset, or a list of MONAI's random transforms."""

    @property
    def reading(self) -> dict[str, Any]:
        """The settings of how scans are read, as arguments of `load_volume` and `verify_scan`."""
        return {"max_b": self.max_b, "b0_threshold": self.b0_threshold, "non_finite": self.non_finite}

    @field_validator("augment")
    @classmethod
    def _keeps_the_side(cls, augment: Augment, info: ValidationInfo) -> Augment:
        if isinstance(augment, tuple) and not info.data.get("allow_left_right"):
            found = [(i, side_problem(each.name, each.arguments)) for i, each in enumerate(augment)]
            problems = [((i, problem[0]), problem[1]) for i, problem in found if problem is not None]
            if problems:
                raise _errors(problems)
        return augment

    @model_validator(mode="after")
    def _fits_together(self) -> PipelineSettings:
        if self.spacing is not None and self.interpolation != "trilinear":
            raise ValueError(f"interpolation: {self.interpolation} is for resizing; with spacing, use trilinear")
        if self.spacing is None and self.crop != "field_of_view":
            raise ValueError(f"crop: {self.crop} needs spacing; without it, the whole field of view is resized")
        check_b_limits(max_b=self.max_b, b0_threshold=self.b0_threshold)
        return self


class PipelineConfig(PipelineSettings):
    """Preprocessing of the scans of one modality.

    MONAI's `Resize(image_size)` and `NormalizeIntensity()` are `interpolation="area", normalise="zscore"`.
    """

    image_size: tuple[PositiveInt, ...]
    """Voxels (X, Y, Z) that the model sees, and frames T for a series."""

    def preprocessing(self) -> dict[str, Any]:
        """Every key as JSON, except those of augmentation, which is for training only."""
        return self.model_dump(mode="json", exclude={"augment", "allow_left_right"})

    @field_validator("image_size")
    @classmethod
    def _has_rank(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (3, 4):
            raise ValueError(f"image_size {value} is neither (X, Y, Z) nor (X, Y, Z, T)")
        return value

    @model_validator(mode="after")
    def _keeps_shape(self) -> PipelineConfig:
        listed = self.augment if isinstance(self.augment, tuple) else ()
        turned = [(i, turned_axes(each.name, each.arguments)) for i, each in enumerate(listed)]
        problems = [
            (("augment", i, "spatial_axes"), f"axes {axes} of image_size {self.image_size} are not of the same length: "
             "turned by 90 degrees, the scan would not fit; choose other axes")
            for i, axes in turned
            if axes is not None and self.image_size[axes[0]] != self.image_size[axes[1]]
        ]  # fmt: skip
        if problems:
            raise _errors(problems)
        return self
