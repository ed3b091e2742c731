"""Configurations: sizes that fit, modalities that keep their order, and layers that a forward reaches."""

from __future__ import annotations

import dataclasses
import json

import pytest

from umbrella_model import PatchEmbedConfig, UmbrellaConfig


def test_counts_of_a_series():
    config = PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), in_channels=2)
    assert config.is_series
    assert config.grid_size == (6, 6, 6, 8)
    assert config.num_patches == 1728
    assert config.patch_elements == 2 * 16**3 * 3


def test_lists_become_tuples_and_the_table_is_frozen():
    config = PatchEmbedConfig(image_size=[96, 96, 96], patch_size=[16, 16, 16])
    assert config == PatchEmbedConfig(image_size=(96, 96, 96), patch_size=(16, 16, 16))
    assert hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 3


def test_a_patch_that_does_not_divide_names_every_axis_and_the_sizes_that_would():
    with pytest.raises(ValueError, match=r"X: 128 is not a multiple of 18 \(try 126 or 144\).*Z: 10 .*try 18 or 18\)"):
        PatchEmbedConfig(image_size=(128, 36, 10), patch_size=(18, 18, 18))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        ((8, 8), (4, 4), "3 axes"),
        ((8, 8, 8), (4, 4, 4, 2), "4 axes, image_size .* has 3"),
        ((8, 8, 8), (4, 4, 0), "positive"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(image_size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedConfig(image_size=image_size, patch_size=patch_size)


def test_modality_order_is_that_of_the_dict_and_survives_the_disk(make_config, tmp_path):
    config = make_config()
    assert config.modality_order == ["rsfMRI", "T1", "dMRI"]
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert list(on_disk["modalities"]) != config.modality_order  # Hugging Face sorts keys: hence a list of its own
    loaded = UmbrellaConfig.from_pretrained(tmp_path)
    assert loaded.modality_order == config.modality_order
    assert list(loaded.modalities.items()) == list(config.modalities.items())


def test_modality_order_that_does_not_name_the_modalities_is_refused(make_config):
    with pytest.raises(ValueError, match="must name each"):
        make_config(modality_order=["T1", "dMRI"])


def test_a_modality_name_that_cannot_be_a_module_name_is_refused(make_config):
    with pytest.raises(ValueError, match=r"'rs\.fMRI'"):
        make_config(modalities={"rs.fMRI": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))})


@pytest.mark.parametrize(("layer", "depth"), [(-1, 3), (-2, 2), (1, 1), (3, 3)])
def test_vision_depth_counts_layers_as_llava_does(make_config, layer, depth):
    assert make_config(vision_feature_layer=layer).vision_depth == depth


@pytest.mark.parametrize(("layer", "message"), [(-5, "outside"), (4, "outside"), ([1, 2], "several feature layers")])
def test_a_feature_layer_that_is_not_there_is_refused(make_config, layer, message):
    with pytest.raises(ValueError, match=message):
        _ = make_config(vision_feature_layer=layer).vision_depth
