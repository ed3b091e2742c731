"""The patch grid of an image, one token per patch; checks the axes of sizes, and that the patch divides the image."""

from __future__ import annotations

from collections.abc import Sequence

from umbrella_data.modality import find_modality

_AXES = "XYZT"


def check_size(size: Sequence[int], *, what: str, modality: str) -> None:
    """Check a size against its modality.

    Args:
        size: Voxels along X, Y and Z, and frames T for a series.
        what: Name of the size for the error message.
        modality: A name or an alias.

    Raises:
        ValueError: If the number of axes is wrong, or a size is less than 1.
    """
    spec = find_modality(modality)
    if len(size) != spec.spatial_rank or min(size) < 1:
        axes = ",".join(_AXES[: spec.spatial_rank])
        raise ValueError(f"{spec.name} needs {what} {axes}, {spec.spatial_rank} whole numbers of at least 1, "
                         f"not {_written(size)}")  # fmt: skip


def patch_grid(image_size: Sequence[int], patch_size: Sequence[int], *, modality: str) -> tuple[int, ...]:
    """Number of patches along each axis of an image; their product is the number of tokens.

    Args:
        image_size: Voxels (and frames) of the image.
        patch_size: Voxels (and frames) of a patch.
        modality: A name or an alias.

    Raises:
        ValueError: If a size does not have the modality's axes, or the patch does not divide the image; the message
            suggests the nearest patch that does.
    """
    check_size(image_size, what="an image size", modality=modality)
    check_size(patch_size, what="a patch size", modality=modality)
    if any(length % patch for length, patch in zip(image_size, patch_size, strict=True)):
        nearest = [_nearest_divisor(length, patch) for length, patch in zip(image_size, patch_size, strict=True)]
        raise ValueError(
            f"{find_modality(modality).name} cannot be divided into patches: a patch of {_written(patch_size)} does "
            f"not divide an image of {_written(image_size)}; did you mean {_written(nearest)}?"
        )
    return tuple(length // patch for length, patch in zip(image_size, patch_size, strict=True))


def _nearest_divisor(length: int, patch: int) -> int:
    return min((each for each in range(1, length + 1) if length % each == 0), key=lambda each: abs(each - patch))


def _written(size: Sequence[int]) -> str:
    return ",".join(map(str, size))
