"""Configurations: sizes that fit, modalities that keep their order, and layers that a forward reaches."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (8.9, 8, 8)}, r"image_size must be whole numbers, got \(8.9, 8, 8\)"),
        ({"image_size": 8}, "image_size is 8; it must be a list of whole numbers, one an axis"),
        ({"patch_size": ("4", 4, 8)}, "patch_size must be whole numbers"),
        ({"pool": (1.7, 1, 1)}, r"pool must be whole numbers, got \(1.7, 1, 1\)"),
        ({"pool": 2.0}, r"pool must be whole numbers, got \(2.0, 2.0, 2.0\)"),
        ({"pool": True}, "pool must be whole numbers"),
        ({"in_channels": 1.5}, r"in_channels must be whole numbers, got \(1.5,\)"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_refused_and_not_cut(change, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedConfig(**({"image_size": (8, 8, 8), "patch_size": (4, 4, 8)} | change))


def test_integers_of_other_libraries_become_plain_ones():
    config = PatchEmbedConfig(image_size=torch.tensor([8, 8, 8]), patch_size=(4, 4, 8), in_channels=torch.tensor(2))
    assert {type(number) for number in (*config.image_size, config.in_channels)} == {int}


def test_a_feature_selection_that_would_be_ignored_is_refused(make_config):
    with pytest.raises(ValueError, match="vision_feature_select_strategy is 'default'; it must be 'full'"):
        make_config(vision_feature_select_strategy="default")


def test_modality_order_is_that_of_the_dict_and_survives_the_disk(make_config, tmp_path):
    config = make_config()
    assert config.modality_order == ["rsfMRI", "T1", "dMRI"]
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert list(on_disk["modalities"]) != config.modality_order  # Hugging Face sorts keys: hence a list of its own
    loaded = UmbrellaConfig.from_pretrained(tmp_path)
    assert loaded.modality_order == config.modality_order
    assert list(loaded.modalities.items()) == list(config.modalities.items())


FLAIR = PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))


def test_a_modality_that_is_set_later_stands_behind_the_others_on_the_disk_too(make_config, tmp_path):
    config = make_config()
    config.modalities = {"FLAIR": FLAIR.to_dict(), **config.modalities}
    assert list(config.patch_embeds) == ["rsfMRI", "T1", "dMRI", "FLAIR"]
    assert config.patch_embeds["FLAIR"] == FLAIR
    config.save_pretrained(tmp_path)
    assert UmbrellaConfig.from_pretrained(tmp_path).modality_order == ["rsfMRI", "T1", "dMRI", "FLAIR"]


def test_a_modality_is_not_taken_out_while_the_order_names_it(make_config):
    config = make_config()
    config.modalities = {name: config.modalities[name] for name in ("rsfMRI", "dMRI")}
    with pytest.raises(
        ValueError, match=r"names T1, which modalities \['rsfMRI', 'dMRI'\] has not; .* modality_order too"
    ):
        _ = config.patch_embeds
    config.modality_order = ["rsfMRI", "dMRI"]
    assert list(config.patch_embeds) == ["rsfMRI", "dMRI"]


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


def test_what_is_no_prediction_is_not_handed_to_metrics() -> None:
    # The cache goes by either name, as transformers is old or new.
    assert {"past_key_values", "cache", "dummy_terms"} <= set(UmbrellaConfig.keys_to_ignore_at_inference)
