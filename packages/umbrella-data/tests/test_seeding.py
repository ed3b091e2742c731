"""Permutations hit every position once, agree between scalar and block, and look random."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella_data.seeding import Permutation, derive_seed


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), key=st.integers(0, 2**62))
def test_permutation_is_a_bijection_and_scalar_equals_block(size, key):
    permutation = Permutation(size, key=key)
    order = permutation.block(0, size)
    assert sorted(order.tolist()) == list(range(size))
    assert [permutation(i) for i in range(size)] == order.tolist()


def test_block_from_the_middle_equals_that_part_of_the_whole():
    permutation = Permutation(200_003, key=5)
    whole = permutation.block(0, 200_003)
    assert np.array_equal(permutation.block(65_536, 131_072), whole[65_536:131_072])
    assert len(np.unique(whole)) == 200_003


def test_permutation_when_huge_needs_no_table():
    permutation = Permutation(10**8, key=1)
    block = permutation.block(10**8 - 4, 10**8)
    assert [permutation(10**8 - 4 + i) for i in range(4)] == block.tolist()
    assert block.max() < 10**8


def test_orders_of_four_are_uniform_over_keys():
    num_keys = 1_200
    permutations = (Permutation(4, key=key) for key in range(num_keys))
    counts = Counter(tuple(permutation(i) for i in range(4)) for permutation in permutations)
    expected = num_keys / 24
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(4)))
    assert chi_square < 23 + 4 * (2 * 23) ** 0.5


def test_neighbours_when_shuffled_are_uncorrelated():
    order = Permutation(50_000, key=3).block(0, 50_000).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02


def test_keys_when_different_give_different_orders():
    orders = {tuple(Permutation(100, key=derive_seed(0, epoch)).block(0, 100).tolist()) for epoch in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("position", [-1, 10])
def test_position_when_outside_is_rejected(position):
    with pytest.raises(IndexError, match="outside"):
        Permutation(10, key=0)(position)


def test_derive_seed_depends_on_the_order_of_its_values():
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert 0 <= derive_seed(-1, 2**62) < 2**63


def test_elements_at_any_positions_are_those_of_the_order():
    order = Permutation(1000, key=5)
    positions = np.array([999, 3, 3, 0, 512])
    assert order.elements(positions).tolist() == [order(position) for position in positions.tolist()]
    with pytest.raises(IndexError, match="not all within 0 to 999"):
        order.elements(np.array([5, 1000]))
