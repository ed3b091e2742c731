"""Asynchronous checks on a GPU: an invalid batch raises without a synchronisation."""

from __future__ import annotations

import pytest
import torch

from umbrella_model.attention import check_right_padding
from umbrella_model.packing import check_not_packed
from umbrella_model.splice import splice_features


class NotOnCpu(torch.Tensor):
    """A CPU tensor that reports another device: takes the GPU's code path, whose assertions raise at once on a CPU."""

    @property
    def device(self):
        return torch.device("meta")


def not_on_cpu(values):
    return torch.tensor(values).as_subclass(NotOnCpu)


@pytest.mark.parametrize("tags", [[[0, 1, 1, 1]], [[0, 1, 0, 0]], [[0, 0, 0, 0]], [[2, 1, 1, 0]]])
def test_numbers_of_tags_and_vision_tokens_that_differ_raise(tags):
    features = {"T1": torch.ones(1, 2, 1)}
    splice_features(torch.zeros(1, 4, 1), features, not_on_cpu([[0, 1, 1, 0]]), modality_order=("T1", "dMRI"))
    with pytest.raises(RuntimeError, match="vision tokens differ"):
        splice_features(torch.zeros(1, 4, 1), features, not_on_cpu(tags), modality_order=("T1", "dMRI"))


@pytest.mark.parametrize("mask", [[[1, 1, 1], [0, 1, 1]], [[1, 0, 1]]])
def test_left_padding_raises(mask):
    check_right_padding(not_on_cpu([[1, 1, 1], [1, 0, 0]]))
    with pytest.raises(RuntimeError, match="padded on the right"):
        check_right_padding(not_on_cpu(mask))


def test_packed_positions_without_boundaries_raise():
    check_not_packed(not_on_cpu([[0, 1, 2]]), None)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        check_not_packed(not_on_cpu([[0, 1, 0]]), None)
