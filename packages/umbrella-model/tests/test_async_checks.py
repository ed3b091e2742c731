"""Checks that a GPU makes while it computes: nothing is read, but a wrong batch still ends the run."""

from __future__ import annotations

import pytest
import torch

from umbrella_model.attention import check_right_padding
from umbrella_model.packing import check_not_packed
from umbrella_model.splice import splice_features


class Elsewhere(torch.Tensor):
    """Lies on the CPU and says that it does not: takes the path of a GPU, whose assertions the CPU makes at once."""

    @property
    def device(self):
        return torch.device("meta")


def elsewhere(values):
    return torch.tensor(values).as_subclass(Elsewhere)


@pytest.mark.parametrize("tags", [[[0, 1, 1, 1]], [[0, 1, 0, 0]], [[0, 0, 0, 0]], [[2, 1, 1, 0]]])
def test_tags_and_vision_tokens_that_differ_in_number_end_the_run(tags):
    features = {"T1": torch.ones(1, 2, 1)}
    splice_features(torch.zeros(1, 4, 1), features, elsewhere([[0, 1, 1, 0]]), modality_order=("T1", "dMRI"))
    with pytest.raises(RuntimeError, match="tagged positions and vision tokens differ"):
        splice_features(torch.zeros(1, 4, 1), features, elsewhere(tags), modality_order=("T1", "dMRI"))


@pytest.mark.parametrize("mask", [[[1, 1, 1], [0, 1, 1]], [[1, 0, 1]]])
def test_padding_on_the_left_ends_the_run(mask):
    check_right_padding(elsewhere([[1, 1, 1], [1, 0, 0]]))
    with pytest.raises(RuntimeError, match="padded on the right"):
        check_right_padding(elsewhere(mask))


def test_packed_positions_that_nothing_tells_apart_end_the_run():
    check_not_packed(elsewhere([[0, 1, 2]]), None)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        check_not_packed(elsewhere([[0, 1, 0]]), None)
