"""Initialisation of patch embeds from a pretrained 2-D encoder."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_model.from_llava import convert_llava
from umbrella_model.inflate import inflate_filter, inflate_positions, resize_filter

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 16, "patch_size": 4}
TOWERS = {"siglip": SiglipVisionConfig(**SIZES), "clip": CLIPVisionConfig(**SIZES)}
FLAT = {
    "T1": PatchEmbedConfig(image_size=(16, 16, 5), patch_size=(4, 4, 5)),
    "rsfMRI": PatchEmbedConfig(image_size=(16, 16, 5, 3), patch_size=(4, 4, 5, 3)),
    "dMRI": PatchEmbedConfig(image_size=(16, 16, 2), patch_size=(4, 4, 2), in_channels=2),
}


def llava(kind):
    torch.manual_seed(0)
    text = Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    config = LlavaConfig(vision_config=TOWERS[kind], text_config=text, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight)
    return model


@pytest.mark.parametrize("modality", FLAT)
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_grey_image_repeated_along_depth_gives_the_2d_patch_features(kind, modality):
    source, grey = llava(kind), torch.randn(2, 1, 16, 16)
    expected = source.model.vision_tower.embeddings(grey.expand(-1, 3, -1, -1))[:, 1 if kind == "clip" else 0 :]
    model, _ = convert_llava(UmbrellaForConditionalGeneration, source, modalities=FLAT)
    config = FLAT[modality]
    volume = grey.view(2, 1, 16, 16, *(1 for _ in config.image_size[2:]))
    volume = volume.expand(2, config.in_channels, *config.image_size)
    tokens = model.model.vision_tower.patch_embed(modality)(volume)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_grey_image_repeated_along_depth_gives_the_2d_models_projected_features():
    source, grey = llava("siglip"), torch.randn(2, 1, 16, 16)
    hidden = source.model.vision_tower(grey.expand(-1, 3, -1, -1), output_hidden_states=True).hidden_states[-1]
    expected = source.model.multi_modal_projector(hidden)
    model, _ = convert_llava(UmbrellaForConditionalGeneration, source, modalities=FLAT)
    features = model.model.vision_tower({"T1": grey[..., None].expand(2, 1, *FLAT["T1"].image_size)}).features["T1"]
    torch.testing.assert_close(model.model.multi_modal_projector(features), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (6, 5), (9, 4)])
def test_an_enlarged_patch_gives_the_same_response(size):
    weight, patches = torch.randn(7, 4, 4, dtype=torch.float64), torch.randn(5, 4, 4, dtype=torch.float64)
    grown = F.interpolate(patches[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    before = torch.einsum("hxy,nxy->nh", weight, patches)
    after = torch.einsum("hxy,nxy->nh", resize_filter(weight, size=size), grown)
    torch.testing.assert_close(after, before)


def test_a_reduced_patch_is_the_least_squares_fit():
    weight = torch.randn(3, 6, 6, dtype=torch.float64)
    basis = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    shrink = F.interpolate(basis, size=(3, 4), mode="bilinear", align_corners=False).view(36, 12)
    expected = torch.linalg.lstsq(shrink, weight.view(3, 36).T).solution.T
    torch.testing.assert_close(resize_filter(weight, size=(3, 4)).reshape(3, 12), expected)


def test_a_filter_is_spread_evenly_over_channels_depth_and_time():
    weight = torch.randn(5, 3, 4, 4)
    inflated = inflate_filter(weight, patch_size=(4, 4, 3, 2), in_channels=2)
    assert inflated.shape == (5, 2, 4, 4, 3, 2)
    torch.testing.assert_close(inflated.sum((1, 4, 5)), weight.double().sum(1))
    assert torch.equal(inflated[:, 0, :, :, 0, 0], inflated[:, 1, :, :, 2, 1])


def test_positions_are_interpolated_in_the_plane_and_differ_along_depth():
    table = torch.randn(16, 24)
    volume = inflate_positions(table, old_grid=(4, 4), grid_size=(6, 5, 3)).view(6, 5, 3, 24)
    plane = F.interpolate(table.view(1, 4, 4, 24).permute(0, 3, 1, 2), size=(6, 5), mode="bilinear")
    torch.testing.assert_close(volume.mean(2), plane[0].permute(1, 2, 0))
    steps = (volume - volume.mean(2, keepdim=True))[0, 0]
    torch.testing.assert_close((volume - volume.mean(2, keepdim=True))[3, 4], steps)
    assert torch.cdist(steps, steps)[~torch.eye(3, dtype=torch.bool)].min() > 0.5
    spread = (plane - plane.mean((2, 3), keepdim=True)).square().mean().sqrt()
    torch.testing.assert_close(steps.square().mean().sqrt(), spread)


def test_positions_of_a_volume_encoder_are_interpolated_and_differ_along_time_alone():
    table = torch.randn(2 * 3 * 4, 24)
    assert torch.equal(inflate_positions(table, old_grid=(2, 3, 4), grid_size=(2, 3, 4)), table)
    series = inflate_positions(table, old_grid=(2, 3, 4), grid_size=(4, 3, 2, 2)).view(24, 2, 24)
    lines = F.interpolate(table.view(1, 2, 3, 4, 24).permute(0, 4, 1, 2, 3), size=(4, 3, 2), mode="trilinear")
    torch.testing.assert_close(series.mean(1), lines[0].flatten(1).T)
    steps = series[:, 1] - series[:, 0]
    torch.testing.assert_close(steps, steps[:1].expand(24, 24))
    assert steps.abs().max() > 0.1


def test_the_filter_of_a_volume_encoder_keeps_its_channels_and_spreads_over_time():
    weight = torch.randn(5, 2, 4, 4, 3)
    assert torch.equal(inflate_filter(weight, patch_size=(4, 4, 3), in_channels=2), weight.double())
    series = inflate_filter(weight, patch_size=(4, 4, 3, 2), in_channels=2)
    torch.testing.assert_close(series, (weight.double() / 2)[..., None].expand(5, 2, 4, 4, 3, 2))
    grey = inflate_filter(weight, patch_size=(4, 4, 3), in_channels=3)
    torch.testing.assert_close(grey, (weight.double().sum(1, keepdim=True) / 3).expand(5, 3, 4, 4, 3))


def test_random_init_does_not_use_the_pretrained_filter():
    inflated, _ = convert_llava(UmbrellaForConditionalGeneration, llava("siglip"), modalities=FLAT)
    random, _ = convert_llava(UmbrellaForConditionalGeneration, llava("siglip"), modalities=FLAT, init="random")
    weight = random.model.vision_tower.T1_patch_embed.proj.weight
    assert weight.std().item() == pytest.approx(80**-0.5, rel=0.1)
    assert not torch.allclose(weight, inflated.model.vision_tower.T1_patch_embed.proj.weight)


def test_inflating_a_bfloat16_model_keeps_its_dtype():
    model, _ = convert_llava(UmbrellaForConditionalGeneration, llava("clip").bfloat16(), modalities=FLAT)
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}


def test_inflation_stays_on_the_device_of_the_weights():
    # Fake tensors have a device but no data, so that no GPU is needed.
    with FakeTensorMode():
        weight, table = torch.empty(8, 3, 4, 4, device="cuda"), torch.empty(16, 24, device="cuda")
        assert inflate_filter(weight, patch_size=(6, 4, 4), in_channels=1).device.type == "cuda"
        assert inflate_positions(table, old_grid=(4, 4), grid_size=(4, 4, 2)).device.type == "cuda"
