"""MONAI's ViT behind the patch embeds: equal features, from a module and from the state dicts found in practice."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_model.encoder_families import encoder_layers
from umbrella_model.inflate import inflate_patch_embed
from umbrella_model.patch_embed import build_patch_embed
from umbrella_model.vision_encoder import load_vision_encoder

pytest.importorskip("einops")  # MONAI's ViT needs it
nets = pytest.importorskip("monai.networks.nets")

SIZES = {"hidden_size": 24, "mlp_dim": 40, "num_layers": 3, "num_heads": 4}
VOLUME = PatchEmbedConfig(image_size=(16, 16, 16), patch_size=(8, 8, 8))


def make_vit(*, image_size=(16, 16, 16), channels=1, patch=(8, 8, 8), network="ViT", **options):
    """A ViT with random tensors, so that zeros of the initialisation cannot hide an error."""
    torch.manual_seed(0)
    options = SIZES | {"proj_type": "conv"} | options
    vit = getattr(nets, network)(in_channels=channels, img_size=image_size, patch_size=patch, **options)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def monai_features(vit, volumes):
    """Normed features of the last block, without the class token."""
    hidden = vit(volumes)[1][-1]
    return vit.norm(hidden)[:, int(hasattr(vit, "cls_token")) :]


def our_features(loaded, volumes, config=VOLUME):
    patch_embed = build_patch_embed(config, hidden_size=24)
    inflate_patch_embed(patch_embed, loaded.patches)
    return loaded.module(patch_embed(volumes))


def state_of(vit, path, wrap=lambda state: state):
    """Saves a state dict in the form that the ending of the path tells."""
    state = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrap(state), path)
    return path


VARIANTS = {
    "conv": {},
    "perceptron": {"proj_type": "perceptron"},
    "bias": {"qkv_bias": True},
    "class-token": {"classification": True},
    "sincos": {"pos_embed_type": "sincos"},
    "attention-saved": {"save_attn": True},
    "channels": {"channels": 2},
    "perceptron-channels": {"channels": 2, "proj_type": "perceptron"},
    "oblong": {"image_size": (16, 8, 24), "patch": (8, 4, 6)},
    "perceptron-oblong": {"image_size": (16, 8, 24), "patch": (8, 4, 6), "proj_type": "perceptron"},
}


@pytest.mark.parametrize("form", ["module", ".safetensors", ".pth"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_features_equal_those_of_monai(variant, form, tmp_path):
    options = VARIANTS[variant]
    vit = make_vit(**options)
    image_size, patch = options.get("image_size", (16, 16, 16)), options.get("patch", (8, 8, 8))
    config = PatchEmbedConfig(image_size, patch, in_channels=options.get("channels", 1))
    volumes = torch.randn(2, config.in_channels, *image_size)
    expected = monai_features(vit, volumes)
    declared = {"image_size": image_size}
    if form == "module":
        source = vit
    else:
        source = state_of(vit, tmp_path / f"vit{form}")
        declared |= {"num_heads": 4}
        if "perceptron" in variant:
            declared |= {"patch_size": patch}
    loaded = load_vision_encoder(source, feature_layer=None, **declared)
    assert loaded.patches.grid_size == config.grid_size
    torch.testing.assert_close(our_features(loaded, volumes, config), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_earlier_layer_is_without_the_norm():
    vit, volumes = make_vit(), torch.randn(2, 1, 16, 16, 16)
    expected = vit(volumes)[1][-2]
    loaded = load_vision_encoder(vit, feature_layer=-2)
    assert len(encoder_layers(loaded.module)) == 2
    torch.testing.assert_close(our_features(loaded, volumes), expected, atol=1e-5, rtol=1e-5)


def test_a_grid_or_patch_that_is_not_cubic_must_be_declared(tmp_path):
    oblong = make_vit(image_size=(16, 16, 24))
    with pytest.raises(ValueError, match="pass image_size"):
        load_vision_encoder(oblong, feature_layer=None)
    with pytest.raises(ValueError, match="gives 8"):
        load_vision_encoder(oblong, feature_layer=None, image_size=(16, 16, 16))
    assert load_vision_encoder(oblong, feature_layer=None, image_size=(16, 16, 24)).patches.grid_size == (2, 2, 3)
    path = state_of(make_vit(channels=2, proj_type="perceptron"), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="pass patch_size"):
        load_vision_encoder(path, feature_layer=None, num_heads=4)


PREFIXES = {
    "module.": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "vit.": lambda state: {"vit." + key: tensor for key, tensor in state.items()} | {"decoder5.w": torch.zeros(2)},
    "encoder.": lambda state: {"epoch": 3, "state_dict": {"encoder." + key: t for key, t in state.items()}},
    "student.backbone.": lambda state: {"student.backbone." + key: tensor for key, tensor in state.items()},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_state_dicts_inside_of_checkpoints_are_found(prefix, tmp_path):
    vit, volumes = make_vit(), torch.randn(2, 1, 16, 16, 16)
    path = state_of(vit, tmp_path / "vit.ckpt", PREFIXES[prefix])
    loaded = load_vision_encoder(path, feature_layer=None, num_heads=4)
    torch.testing.assert_close(our_features(loaded, volumes), monai_features(vit, volumes), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_decoder_of_an_autoencoder_is_dropped_and_logged(caplog, tmp_path):
    source = make_vit(network="ViTAutoEnc", image_size=(16, 16, 16), patch=(4, 4, 4))
    config, volumes = PatchEmbedConfig((16, 16, 16), (4, 4, 4)), torch.randn(2, 1, 16, 16, 16)
    hidden = source.norm(source(volumes)[1][-1])
    path = state_of(source, tmp_path / "vit.pt")
    with caplog.at_level(logging.INFO, logger="umbrella_model.monai_vit"):
        for loaded in (load_vision_encoder(path, feature_layer=None, num_heads=4),
                       load_vision_encoder(source, feature_layer=None)):  # fmt: skip
            torch.testing.assert_close(our_features(loaded, volumes, config), hidden, atol=1e-5, rtol=1e-5)
    assert "conv3d_transpose_1.bias" in caplog.text


@torch.no_grad()
def test_the_encoder_of_a_masked_autoencoder_is_loaded(tmp_path):
    sizes = SIZES | {"decoder_hidden_size": 12, "decoder_mlp_dim": 16, "decoder_num_layers": 1, "decoder_num_heads": 2}
    torch.manual_seed(0)
    source = nets.MaskedAutoEncoderViT(in_channels=1, img_size=(16, 16, 16), patch_size=(8, 8, 8), **sizes).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.3)
    volumes = torch.randn(2, 1, 16, 16, 16)
    tokens = torch.cat((source.cls_token.expand(2, 1, 24), source.patch_embedding(volumes)), dim=1)
    expected = source.blocks(tokens)[:, 1:]
    path = state_of(source, tmp_path / "mae.pt")
    for loaded in (load_vision_encoder(path, feature_layer=None, num_heads=4),
                   load_vision_encoder(source, feature_layer=None)):  # fmt: skip
        torch.testing.assert_close(our_features(loaded, volumes), expected, atol=1e-5, rtol=1e-5)


def test_unused_cross_attention_is_dropped(tmp_path):
    more = {"blocks.0.norm_cross_attn.weight": torch.zeros(24), "blocks.0.cross_attn.out_proj.weight": torch.zeros(2)}
    path = state_of(make_vit(), tmp_path / "vit.pt", lambda state: state | more)
    loaded = load_vision_encoder(path, feature_layer=None, num_heads=4)
    assert not any("cross" in key for key in loaded.module.state_dict())


def test_unknown_and_missing_keys_are_all_listed(tmp_path):
    def change(state):
        del state["blocks.1.norm1.bias"], state["blocks.2.attn.qkv.weight"]
        return state | {"blocks.0.gate": torch.zeros(2), "bogus": torch.zeros(2)}

    path = state_of(make_vit(), tmp_path / "vit.pt", change)
    with pytest.raises(ValueError, match="4 keys") as error:
        load_vision_encoder(path, feature_layer=None, num_heads=4)
    for line in ("missing: blocks.1.norm1.bias", "missing: blocks.2.attn.qkv.weight", "unknown: blocks.0.gate",
                 "unknown: bogus"):  # fmt: skip
        assert line in str(error.value)


def test_the_number_of_heads_of_a_file_must_be_given_and_fit(tmp_path):
    path = state_of(make_vit(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="pass num_heads"):
        load_vision_encoder(path, feature_layer=None)
    with pytest.raises(ValueError, match="5 attention heads"):
        load_vision_encoder(path, feature_layer=None, num_heads=5)
    with pytest.raises(ValueError, match="4 attention heads, not 3"):
        load_vision_encoder(make_vit(), feature_layer=None, num_heads=3)


def test_several_encoders_and_other_files_raise(tmp_path):
    def twice(state):
        return {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in state.items()}

    with pytest.raises(ValueError, match=r"student\., teacher\."):
        load_vision_encoder(state_of(make_vit(), tmp_path / "a.pt", twice), feature_layer=None, num_heads=4)
    torch.save({"w": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no keys of a MONAI ViT"):
        load_vision_encoder(tmp_path / "b.pt", feature_layer=None)
    torch.save(make_vit(), tmp_path / "c.pt")  # a pickled module, which would run its code
    with pytest.raises(ValueError, match="save the state dict"):
        load_vision_encoder(tmp_path / "c.pt", feature_layer=None)
    for name in ("e.pt", "e.safetensors"):
        (tmp_path / name).write_bytes(b"not tensors")
        with pytest.raises(ValueError, match="not a file of tensors"):
            load_vision_encoder(tmp_path / name, feature_layer=None)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_vision_encoder(tmp_path / "gone.pth", feature_layer=None)
    (tmp_path / "d.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        load_vision_encoder(tmp_path / "d.bin", feature_layer=None)


def test_incomplete_files_and_other_objects_are_named_with_what_to_do(tmp_path):
    whole = Path(state_of(make_vit(), tmp_path / "whole.pt")).read_bytes()
    for name, content in (("empty.pt", b""), ("cut.pt", whole[: len(whole) // 2]), ("cut.ckpt", whole[:-100])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: .*copy it again"):
            load_vision_encoder(tmp_path / name, feature_layer=None, num_heads=4)

    def lightning(state):
        return {
            "hyper_parameters": Namespace(lr=1),
            "state_dict": {f"model.{key}": each for key, each in state.items()},
        }

    path = state_of(make_vit(), tmp_path / "last.ckpt", lightning)
    with pytest.raises(ValueError, match=r"last\.ckpt: has objects of argparse\.Namespace.*\['state_dict'\]"):
        load_vision_encoder(path, feature_layer=None, num_heads=4)
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "new.pt")
    load_vision_encoder(tmp_path / "new.pt", feature_layer=None, num_heads=4)


def test_the_unused_class_token_of_old_versions_is_dropped(tmp_path):
    vit = make_vit()
    path = state_of(vit, tmp_path / "old.pt", lambda state: state | {"patch_embedding.cls_token": torch.ones(1, 1, 24)})
    old = load_vision_encoder(path, feature_layer=None, num_heads=4).module.state_dict()
    new = load_vision_encoder(vit, feature_layer=None).module.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in new)


@pytest.mark.parametrize("classification", [False, True])
def test_a_model_with_it_trains_every_parameter_and_reloads(
    make_model, make_batch, make_config, classification, tmp_path
):
    loaded = load_vision_encoder(make_vit(classification=classification), feature_layer=None)
    options = {"vision_config": loaded.config, "vision_final_norm": True}
    torch.manual_seed(0)
    model = UmbrellaForConditionalGeneration(make_config(**options), vision_encoder=loaded.module).train()
    loaded.module.load_state_dict(make_model(**options).model.vision_tower.encoder.state_dict())
    out = model(**make_batch((3, "T1", 2)))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.save_pretrained(tmp_path)
    again, batch = UmbrellaForConditionalGeneration.from_pretrained(tmp_path), make_batch((3, "T1", 2))
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert again.model.vision_tower.encoder.embeddings.count == int(classification)
