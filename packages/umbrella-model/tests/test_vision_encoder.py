"""The contract of every family of vision encoders: features, gradients, saving, and what is rejected."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration, checkpoint_parts
from umbrella_model.encoder_families import FAMILIES, encoder_layers
from umbrella_model.patch_embed import build_patch_embed
from umbrella_model.vision_encoder import inflate_patch_embed, load_vision_encoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
WIDE = SIZES | {"image_size": 16, "intermediate_size": 32}
CONFIGS = {
    "siglip_vision_model": SiglipVisionConfig(**WIDE),
    "siglip2_vision_model": Siglip2VisionConfig(**SIZES, intermediate_size=32, num_patches=16),
    "clip_vision_model": CLIPVisionConfig(**WIDE),
    "dinov2": Dinov2Config(**SIZES, image_size=16, mlp_ratio=2),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SIZES, image_size=16, mlp_ratio=2),
    "vit": ViTConfig(**WIDE),
    "vit_mae": ViTMAEConfig(**WIDE, mask_ratio=0.0),
}
TOWERS = {"vision_config": WIDE, "text_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                                 "num_attention_heads": 2, "vocab_size": 20}}  # fmt: skip
FULL = {
    "siglip": lambda: SiglipModel(SiglipConfig(**TOWERS)),
    "siglip2": lambda: Siglip2Model(
        Siglip2Config(**TOWERS | {"vision_config": {**SIZES, "intermediate_size": 32, "num_patches": 16}})
    ),
    "clip": lambda: CLIPModel(CLIPConfig(**TOWERS)),
    "clip-projection": lambda: CLIPVisionModelWithProjection(CONFIGS["clip_vision_model"]),
    "vit-classifier": lambda: ViTForImageClassification(CONFIGS["vit"]),
    "vit-masked": lambda: ViTForMaskedImageModeling(ViTConfig(**WIDE, encoder_stride=4)),
    "vit-mae": lambda: ViTMAEForPreTraining(CONFIGS["vit_mae"]),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(CONFIGS["dinov2"]),
}
FLAT = PatchEmbedConfig(image_size=(16, 16, 5), patch_size=(4, 4, 5))
LAYERS = [None, -1, -2, 0, 2]


def random_model(model):
    """Every tensor random, so that zeros of the initialisation cannot hide an error."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hugging_face_features(model, grey, layer):
    """Features of a grey image, without special tokens."""
    kind, images = model.config.model_type, grey.expand(-1, 3, -1, -1)
    inputs = {"pixel_values": images}
    if kind == "siglip2_vision_model":
        # Flattened patches of (row, column, colour).
        patches = images.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 3, 5, 1).reshape(len(grey), 16, 48)
        mask = torch.ones(len(grey), 16, dtype=torch.long)
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask,
                  "spatial_shapes": torch.full((len(grey), 2), 4)}  # fmt: skip
    if kind == "vit_mae":
        inputs["noise"] = torch.arange(16.0).expand(len(grey), 16)  # the order of the patches is kept
    out = model(**inputs, output_hidden_states=True)
    hidden = out.last_hidden_state if layer is None else out.hidden_states[layer]
    return hidden[:, hidden.shape[1] - 16 :]


def our_features(loaded, grey, config=FLAT):
    patch_embed = build_patch_embed(config, hidden_size=16)
    inflate_patch_embed(patch_embed, loaded.patches)
    volume = grey[..., None].expand(len(grey), 1, *grey.shape[2:], config.image_size[2])
    return loaded.module(patch_embed(volume))


def test_every_family_is_tested():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_features_of_a_repeated_grey_image_equal_hugging_faces(kind, layer):
    model, grey = random_model(AutoModel.from_config(CONFIGS[kind])), torch.randn(2, 1, 16, 16)
    expected = hugging_face_features(model, grey, layer)
    loaded = load_vision_encoder(model, feature_layer=layer)
    features = our_features(loaded, grey)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert loaded.config is loaded.module.config


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_positions_are_interpolated_to_another_grid(kind):
    loaded = load_vision_encoder(random_model(AutoModel.from_config(CONFIGS[kind])), feature_layer=None)
    assert loaded.patches.grid_size == (4, 4)
    larger = PatchEmbedConfig(image_size=(24, 16, 5), patch_size=(4, 4, 5))
    patch_embed = build_patch_embed(larger, hidden_size=16)
    inflate_patch_embed(patch_embed, loaded.patches)
    table = loaded.patches.positions.T.reshape(1, 16, 4, 4)
    expected = torch.nn.functional.interpolate(table, size=(6, 4), mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(patch_embed.position_embedding, expected)


@pytest.mark.parametrize("kind", FULL)
@torch.no_grad()
def test_only_the_vision_encoder_of_a_whole_checkpoint_is_loaded(kind, tmp_path, caplog):
    whole, grey = random_model(FULL[kind]()), torch.randn(2, 1, 16, 16)
    whole.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="umbrella_model.vision_encoder"):
        loaded = load_vision_encoder(tmp_path, feature_layer=None)
    assert "not read" in caplog.text
    source = FAMILIES[loaded.config.model_type].source
    model = next(module for module in whole.modules() if isinstance(module, source))
    expected = hugging_face_features(model, grey, None)
    loaded.module.eval()
    torch.testing.assert_close(our_features(loaded, grey), expected, atol=1e-5, rtol=1e-5)
    again = load_vision_encoder(whole, feature_layer=None)
    torch.testing.assert_close(our_features(again, grey), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_gets_a_gradient(make_model, make_batch, kind, final_norm):
    model = make_model(vision_config=CONFIGS[kind], vision_final_norm=final_norm)
    out = model(**make_batch((3, "T1", 2)))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    special = model.model.vision_tower.encoder.embeddings.special_tokens
    assert special is None or special.grad.abs().max() > 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_model_gives_identical_features(make_model, kind, tmp_path):
    model = make_model(vision_config=CONFIGS[kind], vision_final_norm=True, vision_feature_layer=-2).eval()
    random_model(model.model.vision_tower)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {key for key in keys if ".vision_tower.encoder." in key} == {
        f"model.vision_tower.encoder.{key}" for key in model.model.vision_tower.encoder.state_dict()
    }
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    volumes = {"T1": torch.randn(2, 1, 8, 8, 8)}
    with torch.no_grad():
        expected = model.model.vision_tower(volumes).features["T1"]
        assert torch.equal(loaded.model.vision_tower(volumes).features["T1"], expected)
    assert loaded.config.vision_final_norm


@pytest.mark.parametrize("kind", FAMILIES)
def test_layer_names_are_those_of_hugging_face(kind):
    theirs = AutoModel.from_config(CONFIGS[kind]).state_dict().keys()
    ours = load_vision_encoder(CONFIGS[kind], feature_layer=None).module.state_dict().keys()
    assert ours - {"embeddings.special_tokens"} < theirs
    assert sum(".0." in key for key in ours) == sum(".0." in key for key in theirs) > 10


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_bare_config_gives_random_weights_and_nothing_to_inflate(kind):
    loaded = load_vision_encoder(CONFIGS[kind], feature_layer=-2, dtype=torch.bfloat16)
    assert loaded.patches is None
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.bfloat16}
    assert len(encoder_layers(loaded.module)) == 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpointing_and_attention_can_be_chosen(make_model, make_batch, kind):
    model, batch = make_model(vision_config=CONFIGS[kind]), make_batch((3, "T1", 2))
    calls = []
    encoder_layers(model.model.vision_tower.encoder)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = model(**batch).loss
    checkpoint_parts(model, "vision_tower")
    calls.clear()
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert len(calls) == 2  # once more in backward
    parts = encoder_layers(model.model.vision_tower.encoder).modules()
    attentions = [part for part in parts if type(part).__name__.endswith("Attention")]
    for name in ("eager", "varlen", "sdpa"):
        model.set_attn_implementation(name)
        assert {part.config._attn_implementation for part in attentions} == {name}
        torch.testing.assert_close(model(**batch).loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_compiled_layers_give_equal_features(make_model, kind):
    torch._dynamo.reset()
    model = make_model(vision_config=CONFIGS[kind]).eval()
    volumes = {"T1": torch.randn(2, 1, 8, 8, 8), "dMRI": torch.randn(1, 2, 8, 8, 4)}
    with torch.no_grad():
        expected = model.model.vision_tower(volumes).features
        for layer in encoder_layers(model.model.vision_tower.encoder):
            layer.forward = torch.compile(layer.forward, dynamic=True, backend="eager", fullgraph=True)
        features = model.model.vision_tower(volumes).features
    for name in volumes:
        torch.testing.assert_close(features[name], expected[name])


@pytest.mark.parametrize("config", [SwinConfig(), ResNetConfig()])
def test_other_encoders_are_rejected_by_name(config):
    with pytest.raises(ValueError, match=config.model_type) as error:
        load_vision_encoder(config, feature_layer=None)
    assert all(kind in str(error.value) for kind in FAMILIES)


def test_a_feature_layer_out_of_range_raises():
    with pytest.raises(ValueError, match=r"vision_feature_layer 4 .*3 layers"):
        load_vision_encoder(CONFIGS["vit"], feature_layer=4)


LAYER = "encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER), rf"missing in the checkpoint: {LAYER}"),
        (lambda t: t.pop("embeddings.class_embedding"), r"missing in the checkpoint: embeddings\.class_embedding"),
        (lambda t: t.update({LAYER.replace("1", "7"): torch.zeros(2)}), r"not in the model: encoder\.layers\.7\.mlp"),
        (lambda t: t.update({LAYER: torch.zeros(2, 3)}), rf"shape mismatch: {LAYER}"),
    ],
)
def test_keys_of_a_checkpoint_must_match(change, message, tmp_path):
    AutoModel.from_config(CONFIGS["clip_vision_model"]).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tensors = {key.removeprefix("vision_model."): tensor for key, tensor in stored.items()}
    assert LAYER in tensors
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_vision_encoder(tmp_path, feature_layer=None)


def test_positions_without_a_square_grid_are_rejected():
    config = Siglip2VisionConfig(**SIZES, intermediate_size=32, num_patches=15)
    with pytest.raises(ValueError, match=r"\(siglip2_vision_model\) has positions of 15 patches"):
        load_vision_encoder(config, feature_layer=None)
