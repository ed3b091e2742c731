"""Pooling: which tokens are averaged, how many are left, and that the model counts on them."""

from __future__ import annotations

import itertools

import pytest
import torch

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_model.pooling import pool_tokens

SERIES = PatchEmbedConfig(image_size=(8, 8, 8, 6), patch_size=(2, 2, 4, 1), pool=(2, 4, 1, 3))


def test_tokens_of_a_block_are_averaged_in_grid_order():
    tokens = torch.randn(2, SERIES.num_patches, 5)
    grid = tokens.view(2, *SERIES.grid_size, 5)
    expected = []
    for start in itertools.product(range(0, 4, 2), range(0, 4, 4), range(2), range(0, 6, 3)):
        block = [slice(begin, begin + size) for begin, size in zip(start, SERIES.pool_size, strict=True)]
        expected.append(grid[(slice(None), *block)].flatten(1, 4).mean(1))
    pooled = pool_tokens(tokens, SERIES)
    assert pooled.shape[1] == SERIES.num_tokens == 8
    torch.testing.assert_close(pooled, torch.stack(expected, dim=1))


def test_a_pool_of_one_changes_nothing():
    config = PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))
    assert config.pool_size == (1, 1, 1)
    tokens = torch.randn(1, 8, 3)
    assert pool_tokens(tokens, config) is tokens


def test_one_number_stands_for_all_axes():
    config = PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), pool=2)
    assert config.pool == (2, 2, 2, 2)
    assert (config.num_patches, config.num_tokens) == (1728, 108)
    assert PatchEmbedConfig(**config.to_dict()) == config


def test_a_pool_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"pool must divide the grid of patches: X: 6 .*4 \(try 4 or 8\); T: 8"):
        PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), pool=(4, 2, 2, 3))
    with pytest.raises(ValueError, match=r"pool \(2, 2\) has 2 axes"):
        PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4), pool=(2, 2))


def test_the_model_takes_as_many_positions_as_tokens_are_left(make_model, make_batch, tmp_path):
    modalities = {
        "rsfMRI": PatchEmbedConfig(image_size=(8, 8, 8, 4), patch_size=(4, 4, 8, 2), pool=(2, 1, 1, 2)),
        "T1": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8)),
    }
    model = make_model(modalities=modalities)
    assert (model.num_image_tokens("rsfMRI"), model.num_image_tokens("T1")) == (2, 4)
    batch = make_batch((2, "rsfMRI", "T1", 2), (1, "rsfMRI", 2), modalities=modalities)
    out = model(**batch)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).loss, out.loss)
