"""Pseudo-random permutations without a table: any position of a shuffled order of 10^8 samples in O(1)."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK64 = (1 << 64) - 1
# Multipliers of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_NUM_ROUNDS = 10
# Very small Feistel networks shuffle badly: below 64 positions, a network of 64 is used.
_MIN_BITS = 6


def derive_seed(*values: int) -> int:
    """Hash integers to one seed of 63 bits: neighbouring inputs give unrelated seeds.

    Args:
        values: For example a run's seed and an epoch; order matters, each between -2^63 and 2^63 - 1.
    """
    packed = struct.pack(f"<{len(values)}q", *values)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Permutation:
    """A keyed permutation of `range(size)`: a Feistel network over a power of two, applied until the result is inside.

    Args:
        size: Number of positions.
        key: Any integer from `derive_seed`; each gives another order.
    """

    def __init__(self, size: int, *, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one position, not {size}")
        self.size = size
        bits = max(_MIN_BITS, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        self._round_keys = [derive_seed(key, round_number) for round_number in range(_NUM_ROUNDS)]

    def __call__(self, position: int) -> int:
        """The element at one position of the shuffled order."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside of 0 to {self.size - 1}")
        value = self._encrypt(position)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def block(self, start: int, stop: int) -> NDArray[np.int64]:
        """The elements at positions `start` to `stop - 1`: shape (stop - start,)."""
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"positions {start} to {stop} are outside of 0 to {self.size}")
        return self._walk(np.arange(start, stop, dtype=np.uint64))

    def elements(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The elements at positions of shape (N,): shape (N,)."""
        if positions.size and not (positions.min() >= 0 and positions.max() < self.size):
            raise IndexError(f"positions from {positions.min()} to {positions.max()} are not all within 0 to "
                             f"{self.size - 1}")  # fmt: skip
        return self._walk(positions.astype(np.uint64))

    def _walk(self, positions: NDArray[np.uint64]) -> NDArray[np.int64]:
        values = self._encrypt(positions)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _encrypt(self, values: Any) -> Any:
        """The network applied once to one integer, or of an array of uint64, which wraps as the mask does."""
        low, high = values & self._low_mask, values >> self._low_bits
        for number, round_key in enumerate(self._round_keys):
            if number % 2 == 0:
                high = high ^ _mix(low + round_key) & self._high_mask
            else:
                low = low ^ _mix(high + round_key) & self._low_mask
        return high << self._low_bits | low


def _mix(values: Any) -> Any:
    values = (values ^ values >> 30) * _MULTIPLIER_1 & _MASK64
    values = (values ^ values >> 27) * _MULTIPLIER_2 & _MASK64
    return values ^ values >> 31
