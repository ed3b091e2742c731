"""Frames that are too many for memory: in a file without a name, mapped, so that the system may write them out."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from umbrella_data.cache.entry import unusable

MAX_IN_MEMORY = 1 << 28
"""The most voxels kept in memory: 1 GiB in float32, 300 frames of 96^3."""


def empty_frames(shape: tuple[int, ...], *, folder: Path | None) -> np.ndarray:
    """Memory for frames (T, X, Y, Z) float32, to be filled.

    Args:
        shape: Of all frames.
        folder: Where those go that are too many for memory, into a file that is gone with the array, even when the
            process is killed; None keeps any number in memory.

    Raises:
        CacheError: Where the folder has no room for them.
    """
    num_voxels = math.prod(shape)
    if folder is None or num_voxels <= MAX_IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    num_bytes = num_voxels * np.dtype(np.float32).itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # All of it at once: to run out of disk while a mapped page is written would end the process, without a
            # word.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS has no such call
                file.truncate(num_bytes)
            return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=np.float32).reshape(shape)
    except OSError as error:
        # While a scan is open, any other error of the system is taken for one of the scan's.
        raise unusable(folder, error) from error
