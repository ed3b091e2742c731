"""Configurations: validation of sizes, order of modalities, and encoder depth."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from umbrella_model import PatchEmbedConfig, UmbrellaConfig


def test_sizes_of_a_series():
    config = PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), in_channels=2)
    assert config.is_series
    assert config.grid_size == (6, 6, 6, 8)
    assert config.num_patches == 1728
    assert config.patch_elements == 2 * 16**3 * 3


def test_lists_become_tuples_and_the_config_is_frozen():
    config = PatchEmbedConfig(image_size=[96, 96, 96], patch_size=[16, 16, 16])
    assert config == PatchEmbedConfig(image_size=(96, 96, 96), patch_size=(16, 16, 16))
    assert hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 3


def test_indivisible_patch_size_raises_with_axes_and_valid_sizes():
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
def test_invalid_sizes_raise(image_size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedConfig(image_size=image_size, patch_size=patch_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (8.9, 8, 8)}, r"image_size .*\(8.9, 8, 8\)"),
        ({"image_size": 8}, "image_size is 8"),
        ({"patch_size": ("4", 4, 8)}, "patch_size .*'4'"),
        ({"pool": (1.7, 1, 1)}, r"pool .*\(1.7, 1, 1\)"),
        ({"pool": 2.0}, r"pool .*\(2.0, 2.0, 2.0\)"),
        ({"pool": True}, "pool .*True"),
        ({"in_channels": 1.5}, r"in_channels .*\(1.5,\)"),
    ],
)
def test_sizes_that_are_not_integers_raise(change, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedConfig(**({"image_size": (8, 8, 8), "patch_size": (4, 4, 8)} | change))


def test_tensor_sizes_become_python_integers():
    config = PatchEmbedConfig(image_size=torch.tensor([8, 8, 8]), patch_size=(4, 4, 8), in_channels=torch.tensor(2))
    assert {type(number) for number in (*config.image_size, config.in_channels)} == {int}


def test_unsupported_feature_select_strategy_raises(make_config):
    with pytest.raises(ValueError, match="vision_feature_select_strategy is 'default'"):
        make_config(vision_feature_select_strategy="default")


def test_modality_order_follows_the_dict_and_is_saved(make_config, tmp_path):
    config = make_config()
    assert config.modality_order == ["rsfMRI", "T1", "dMRI"]
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert list(on_disk["modalities"]) != config.modality_order  # Hugging Face sorts keys
    loaded = UmbrellaConfig.from_pretrained(tmp_path)
    assert loaded.modality_order == config.modality_order
    assert list(loaded.modalities.items()) == list(config.modalities.items())


FLAIR = PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))


def test_a_modality_added_later_comes_last_also_when_saved(make_config, tmp_path):
    config = make_config()
    config.modalities = {"FLAIR": FLAIR.to_dict(), **config.modalities}
    assert list(config.patch_embeds) == ["rsfMRI", "T1", "dMRI", "FLAIR"]
    assert config.patch_embeds["FLAIR"] == FLAIR
    config.save_pretrained(tmp_path)
    assert UmbrellaConfig.from_pretrained(tmp_path).modality_order == ["rsfMRI", "T1", "dMRI", "FLAIR"]


def test_removing_a_modality_raises_unless_the_order_changes_too(make_config):
    config = make_config()
    config.modalities = {name: config.modalities[name] for name in ("rsfMRI", "dMRI")}
    with pytest.raises(ValueError, match=r"T1.* \['rsfMRI', 'dMRI'\].*set modality_order"):
        _ = config.patch_embeds
    config.modality_order = ["rsfMRI", "dMRI"]
    assert list(config.patch_embeds) == ["rsfMRI", "dMRI"]


def test_modality_order_without_every_modality_raises(make_config):
    with pytest.raises(ValueError, match=r"modality_order .*'rsfMRI'"):
        make_config(modality_order=["T1", "dMRI"])


def test_modality_name_that_is_not_an_identifier_raises(make_config):
    with pytest.raises(ValueError, match=r"'rs\.fMRI'"):
        make_config(modalities={"rs.fMRI": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))})


@pytest.mark.parametrize(("layer", "depth"), [(-1, 3), (-2, 2), (1, 1), (3, 3)])
def test_vision_depth_counts_layers_as_llava_does(make_config, layer, depth):
    assert make_config(vision_feature_layer=layer).vision_depth == depth


@pytest.mark.parametrize(("layer", "message"), [(-5, "-5"), (4, "4"), ([1, 2], "several feature layers")])
def test_unsupported_feature_layer_raises(make_config, layer, message):
    with pytest.raises(ValueError, match=message):
        _ = make_config(vision_feature_layer=layer).vision_depth


def test_cache_and_dummy_terms_are_not_passed_to_metrics() -> None:

    assert {"past_key_values", "cache", "dummy_terms"} <= set(UmbrellaConfig.keys_to_ignore_at_inference)
