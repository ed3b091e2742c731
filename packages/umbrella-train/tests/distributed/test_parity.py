"""The hash that ranks compare changes with every change of a parameter."""

from __future__ import annotations

import pytest
import torch

from umbrella_train.distributed import parity
from umbrella_train.distributed.parity import check_rank_parity, hash_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_changes_with_one_bit_and_with_exchanged_elements(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed, exchanged = values.clone(), values.clone()
    changed[-1] = torch.nextafter(values[-1], torch.tensor(9.0, dtype=dtype))
    exchanged[[3, 500]] = values[[500, 3]]
    assert hash_bits(values) == hash_bits(values.clone())
    assert hash_bits(changed) != hash_bits(values)
    assert hash_bits(exchanged) != hash_bits(values)


def test_hash_does_not_depend_on_the_chunk_size(monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = hash_bits(values)
    monkeypatch.setattr(parity, "_CHUNK", 7)
    assert hash_bits(values) == whole
    assert hash_bits(values[torch.arange(999, -1, -1)]) != whole


def test_single_process_is_not_compared():
    check_rank_parity(torch.nn.Linear(2, 2), step=1)
