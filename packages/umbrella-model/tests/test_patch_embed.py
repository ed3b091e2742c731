"""Patch embeds compared with convolution and explicit loops; order, sizes, dummy terms and pooling of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from umbrella_model import PatchEmbedConfig, SeriesPatchEmbed, UmbrellaForConditionalGeneration, VolumePatchEmbed
from umbrella_model.patch_embed import build_patch_embed, pool_tokens
from umbrella_model.positions import sincos_position_embedding

VOLUME = PatchEmbedConfig(image_size=(8, 12, 6), patch_size=(4, 3, 2), in_channels=2)
SERIES = PatchEmbedConfig(image_size=(4, 6, 4, 6), patch_size=(2, 3, 2, 2), in_channels=2)


def without_positions(patch_embed: nn.Module) -> nn.Module:
    nn.init.zeros_(patch_embed.position_embedding)
    nn.init.normal_(patch_embed.proj.bias)
    return patch_embed


def test_volume_patch_embed_equals_conv3d_forward_and_backward():
    torch.manual_seed(0)
    patch_embed = without_positions(VolumePatchEmbed(VOLUME, hidden_size=10))
    conv = nn.Conv3d(2, 10, VOLUME.patch_size, stride=VOLUME.patch_size)
    conv.load_state_dict({"weight": patch_embed.proj.weight.view_as(conv.weight), "bias": patch_embed.proj.bias})
    ours = torch.randn(3, 2, *VOLUME.image_size, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    tokens, expected = patch_embed(ours), conv(theirs).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(tokens)
    tokens.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        patch_embed.proj.weight.grad, conv.weight.grad.view_as(patch_embed.proj.weight), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(patch_embed.proj.bias.grad, conv.bias.grad, atol=1e-4, rtol=1e-5)


def test_series_patch_embed_equals_explicit_loops_forward_and_backward():
    torch.manual_seed(0)
    patch_embed = without_positions(SeriesPatchEmbed(SERIES, hidden_size=9))
    series = torch.randn(2, 2, *SERIES.image_size, requires_grad=True)
    filters = patch_embed.proj.weight.view(9, 2, *SERIES.patch_size)
    rows = []
    for start in itertools.product(
        *(range(0, s, p) for s, p in zip(SERIES.image_size, SERIES.patch_size, strict=True))
    ):
        (x, y, z, t), (dx, dy, dz, dt) = start, SERIES.patch_size
        patch = series[:, :, x : x + dx, y : y + dy, z : z + dz, t : t + dt]
        rows.append(torch.einsum("ncxyzt,hcxyzt->nh", patch, filters) + patch_embed.proj.bias)
    tokens, expected = patch_embed(series), torch.stack(rows, dim=1)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(tokens)
    grads = torch.autograd.grad(tokens, [series, patch_embed.proj.weight], upstream)
    references = torch.autograd.grad(expected, [series, patch_embed.proj.weight], upstream)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [VOLUME, SERIES])
def test_last_axis_of_the_token_order_varies_fastest(config: PatchEmbedConfig):
    patch_embed = build_patch_embed(config, hidden_size=16)
    for token, cell in enumerate(itertools.product(*(range(size) for size in config.grid_size))):
        volume = torch.zeros(1, config.in_channels, *config.image_size)
        volume[(0, 1, *(i * p for i, p in zip(cell, config.patch_size, strict=True)))] = 1.0
        assert patch_embed.patchify(volume).abs().sum(2).nonzero()[:, 1].tolist() == [token]


@pytest.mark.parametrize("config", [VOLUME, SERIES])
def test_voxels_of_a_patch_are_channels_first(config: PatchEmbedConfig):
    patch_embed = build_patch_embed(config, hidden_size=16)
    volume = torch.randn(1, config.in_channels, *config.image_size)
    corner = volume[(0, slice(None), *(slice(p) for p in config.patch_size))]
    assert torch.equal(patch_embed.patchify(volume)[0, 0], corner.flatten())


def test_positions_are_added_to_each_token():
    patch_embed = VolumePatchEmbed(VOLUME, hidden_size=12)
    tokens = patch_embed(torch.zeros(2, 2, *VOLUME.image_size))
    torch.testing.assert_close(tokens[1], sincos_position_embedding(VOLUME.grid_size, 12))


def test_wrong_volume_shape_raises_with_both_shapes():
    patch_embed = VolumePatchEmbed(VOLUME, hidden_size=12)
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 12, 8\).*\(N, 2, 8, 12, 6\)"):
        patch_embed(torch.zeros(1, 2, 8, 12, 8))
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 12, 6\)"):
        patch_embed(torch.zeros(1, 1, *VOLUME.image_size))


def test_patch_embed_with_the_wrong_number_of_axes_raises():
    with pytest.raises(ValueError, match=r"VolumePatchEmbed .*3 axes"):
        VolumePatchEmbed(SERIES, hidden_size=16)
    with pytest.raises(ValueError, match=r"SeriesPatchEmbed .*4 axes"):
        SeriesPatchEmbed(VOLUME, hidden_size=16)
    assert isinstance(build_patch_embed(VOLUME, hidden_size=16), VolumePatchEmbed)
    assert isinstance(build_patch_embed(SERIES, hidden_size=16), SeriesPatchEmbed)


def test_random_filters_have_unit_gain():
    torch.manual_seed(0)
    config = PatchEmbedConfig(image_size=(16, 16, 16), patch_size=(8, 8, 8))
    patch_embed = without_positions(VolumePatchEmbed(config, hidden_size=64))
    nn.init.zeros_(patch_embed.proj.bias)
    assert patch_embed(torch.randn(8, 1, 16, 16, 16)).std().item() == pytest.approx(1.0, rel=0.05)


def test_dummy_term_is_the_scaled_sum_with_a_gradient_norm_of_one():
    patch_embed = SeriesPatchEmbed(SERIES, hidden_size=16)
    parameters = list(patch_embed.parameters())
    num_elements = sum(parameter.numel() for parameter in parameters)
    term = patch_embed(None)
    assert term.shape == ()
    expected = sum(parameter.double().sum() for parameter in parameters) / math.sqrt(num_elements)
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    term.backward()
    norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in parameters))
    assert norm == pytest.approx(1.0, rel=1e-6)


def test_dummy_term_counts_only_trainable_elements():
    patch_embed = VolumePatchEmbed(VOLUME, hidden_size=12)
    patch_embed.position_embedding.requires_grad_(False)
    patch_embed.proj.bias.requires_grad_(False)
    patch_embed(None).backward()
    assert patch_embed.proj.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-6)
    assert patch_embed.position_embedding.grad is None
    assert patch_embed.requires_grad_(False)(None) is None


def test_dummy_term_of_a_float16_model_does_not_overflow():
    config = PatchEmbedConfig(image_size=(64, 64, 32), patch_size=(64, 64, 32))
    patch_embed = VolumePatchEmbed(config, hidden_size=8).half()
    nn.init.ones_(patch_embed.proj.weight)
    term = patch_embed(None)
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(math.sqrt(patch_embed.proj.weight.numel()), rel=1e-3)


def test_bfloat16_patch_embed_accepts_float32_volumes():
    patch_embed = VolumePatchEmbed(VOLUME, hidden_size=12).bfloat16()
    assert patch_embed(torch.randn(1, 2, *VOLUME.image_size)).dtype == torch.bfloat16


def test_dummy_term_keeps_no_copy_of_the_weights_for_backward():
    embed = VolumePatchEmbed(PatchEmbedConfig((8, 8, 8), (4, 4, 4)), hidden_size=16)
    saved = []

    def record(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        embed(None)
    assert sum(saved) <= 1


@pytest.fixture
def embed_under_zero_3():
    """A patch embed with the attributes that DeepSpeed sets, and with its weights gathered."""
    embed = VolumePatchEmbed(PatchEmbedConfig((8, 8, 8), (4, 4, 4)), hidden_size=16)
    for parameter in embed.parameters():
        parameter.ds_id, parameter.ds_numel = 0, parameter.numel()
    return embed


def test_dummy_term_under_zero_3_calls_the_projection_with_equal_gradients(embed_under_zero_3):
    embed, calls = embed_under_zero_3, []
    embed.proj.register_forward_pre_hook(lambda *_: calls.append("proj"))
    term = embed(None)
    assert calls == ["proj"]
    root = math.sqrt(sum(parameter.numel() for parameter in embed.parameters()))
    plain = sum(parameter.double().sum() for parameter in embed.parameters()) / root
    assert term.item() == pytest.approx(plain.item(), rel=1e-5)
    term.backward()
    assert all(torch.allclose(parameter.grad * root, torch.ones(())) for parameter in embed.parameters())


def test_adapters_in_a_patch_embed_raise_under_zero_3(embed_under_zero_3):
    embed_under_zero_3.proj = torch.nn.Sequential(embed_under_zero_3.proj)
    with pytest.raises(ValueError, match="ZeRO-3"):
        embed_under_zero_3(None)


POOLED_SERIES = PatchEmbedConfig(image_size=(8, 8, 8, 6), patch_size=(2, 2, 4, 1), pool=(2, 4, 1, 3))


def test_tokens_of_a_block_are_averaged_in_grid_order():
    tokens = torch.randn(2, POOLED_SERIES.num_patches, 5)
    grid = tokens.view(2, *POOLED_SERIES.grid_size, 5)
    expected = []
    for start in itertools.product(range(0, 4, 2), range(0, 4, 4), range(2), range(0, 6, 3)):
        block = [slice(begin, begin + size) for begin, size in zip(start, POOLED_SERIES.pool_size, strict=True)]
        expected.append(grid[(slice(None), *block)].flatten(1, 4).mean(1))
    pooled = pool_tokens(tokens, POOLED_SERIES)
    assert pooled.shape[1] == POOLED_SERIES.num_tokens == 8
    torch.testing.assert_close(pooled, torch.stack(expected, dim=1))


def test_pool_of_one_returns_the_tokens():
    config = PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4))
    assert config.pool_size == (1, 1, 1)
    tokens = torch.randn(1, 8, 3)
    assert pool_tokens(tokens, config) is tokens


def test_a_single_pool_size_applies_to_all_axes():
    config = PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), pool=2)
    assert config.pool == (2, 2, 2, 2)
    assert (config.num_patches, config.num_tokens) == (1728, 108)
    assert PatchEmbedConfig(**config.to_dict()) == config


def test_indivisible_pool_raises():
    with pytest.raises(ValueError, match=r"pool .*X: 6 .*4 \(try 4 or 8\); T: 8"):
        PatchEmbedConfig(image_size=(96, 96, 96, 24), patch_size=(16, 16, 16, 3), pool=(4, 2, 2, 3))
    with pytest.raises(ValueError, match=r"pool \(2, 2\) has 2 axes"):
        PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 4), pool=(2, 2))


def test_a_model_with_pooling_trains_and_reloads(make_model, make_batch, tmp_path):
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
