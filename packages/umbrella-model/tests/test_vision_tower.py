"""Vision tower: order of calls, dummy terms, gradients of every parameter, and features equal to Hugging Face's."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, SiglipVisionConfig, SwinConfig

from umbrella_model import supervised_index

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
ENCODERS = {
    "siglip": SiglipVisionConfig(**SIZES, image_size=16, patch_size=4),
    "siglip-without-head": SiglipVisionConfig(**SIZES, image_size=16, patch_size=4, vision_use_head=False),
    "clip": CLIPVisionConfig(**SIZES, image_size=16, patch_size=4),
}
REACHES = [("siglip", -1), ("siglip", -2), ("siglip-without-head", -1), ("clip", -2), ("clip", -1)]


def record_patch_embed_calls(model):
    calls = []
    for name in model.model.vision_tower.modality_order:
        module = model.model.vision_tower.patch_embed(name)
        module.register_forward_hook(lambda module, args, output, name=name: calls.append((name, args[0] is not None)))
    return calls


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("row", "present"),
    [
        ((3, "T1", 2), {"T1"}),
        ((3, "dMRI", 1, "rsfMRI", 2), {"dMRI", "rsfMRI"}),
        ((1, "dMRI", "T1", "rsfMRI", 2), {"dMRI", "T1", "rsfMRI"}),
        ((5,), set()),
    ],
)
def test_every_patch_embed_is_called_once_in_modality_order(make_model, make_batch, row, present):
    model = make_model()
    calls = record_patch_embed_calls(model)
    batch = make_batch(row)
    batch["pixel_values"] = dict(reversed(batch["pixel_values"].items()))
    out = model(**batch)
    assert calls == [(name, name in present) for name in ("rsfMRI", "T1", "dMRI")]
    assert list(out.dummy_terms) == [name for name in ("rsfMRI", "T1", "dMRI") if name not in present]


def test_dummy_terms_give_only_absent_patch_embeds_gradients_of_norm_one(make_model, make_batch):
    model = make_model()
    terms = model(**make_batch((3, "T1", 2))).dummy_terms
    sum(terms.values()).backward()
    for name in ("rsfMRI", "dMRI"):
        grads = [p.grad.double() for p in model.model.vision_tower.patch_embed(name).parameters()]
        assert math.sqrt(sum(g.square().sum().item() for g in grads)) == pytest.approx(1.0, rel=1e-6)
    reached = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"rsfMRI_patch_embed", "dMRI_patch_embed"}


def test_no_dummy_terms_in_eval_mode_or_under_no_grad(make_model, make_batch):
    model, batch = make_model(), make_batch((3, "T1", 2))
    with torch.no_grad():
        assert model(**batch).dummy_terms == {}
    assert model.eval()(**batch).dummy_terms == {}


def test_no_dummy_term_for_a_frozen_patch_embed(make_model, make_batch):
    model = make_model()
    model.model.vision_tower.patch_embed("rsfMRI").requires_grad_(False)
    assert list(model(**make_batch((3, "T1", 2))).dummy_terms) == ["dMRI"]
    assert sorted(model.dummy_sizes()) == ["T1", "dMRI"]


def test_dummy_sizes_count_the_trainable_elements(make_model):
    model = make_model()
    config = model.config.modalities["T1"]
    expected = config.patch_elements * 16 + 16 + config.num_patches * 16
    assert model.dummy_sizes()["T1"] == expected
    model.model.vision_tower.T1_patch_embed.position_embedding.requires_grad_(False)
    assert model.dummy_sizes()["T1"] == expected - config.num_patches * 16


@pytest.mark.parametrize(("kind", "layer"), REACHES)
@pytest.mark.parametrize("row", [(3, "T1", 2), (4, "dMRI", "rsfMRI", "T1", 2), (6,)])
def test_every_trainable_parameter_gets_a_gradient(make_model, make_batch, kind, layer, row):
    model = make_model(vision_config=ENCODERS[kind], vision_feature_layer=layer)
    out = model(**make_batch(row))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert without_gradient(model) == []


def test_every_parameter_gets_a_gradient_from_text_without_tags(make_model, make_batch):
    model = make_model()
    batch = make_batch((6,), (4,))
    del batch["modality_ids"], batch["pixel_values"]
    out = model(**batch)
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert without_gradient(model) == []
    encoder = model.model.vision_tower.encoder
    assert max(p.grad.abs().max() for p in encoder.parameters()) == 0.0


@pytest.mark.parametrize("trained", ["encoder", "multi_modal_projector", "patch_embed"])
def test_every_parameter_of_one_trained_part_gets_a_gradient_from_text(make_model, make_batch, trained):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    out = model(**make_batch((6,)))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert without_gradient(model) == []


def test_text_only_loss_equals_that_of_the_language_model(make_model, make_batch):
    model = make_model()
    batch = make_batch((6,), (4,))
    out = model(**batch)
    hidden = model.model.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = model.lm_head(hidden.last_hidden_state).flatten(0, 1)[supervised_index(batch["labels"])]
    torch.testing.assert_close(out.supervised_logits, logits)


def test_an_infinite_placeholder_does_not_reach_the_loss(make_model, make_batch):
    model = make_model()
    torch.nn.init.constant_(model.model.multi_modal_projector.linear_2.bias, float("inf"))
    assert model(**make_batch((6,))).loss.isfinite()


@pytest.mark.parametrize(("kind", "layer"), [*REACHES, ("siglip", 1)])
def test_features_equal_hidden_states_of_the_hugging_face_encoder(make_model, kind, layer):
    model = make_model(vision_config=ENCODERS[kind], vision_feature_layer=layer).eval()
    tower = model.model.vision_tower
    reference = AutoModel.from_config(ENCODERS[kind]).eval()
    missing, unexpected = reference.load_state_dict(tower.encoder.state_dict(), strict=False)
    special = tower.encoder.embeddings.count
    assert unexpected == ["embeddings.special_tokens"] * special
    assert not any(f"layers.{i}." in name for name in missing for i in range(model.config.vision_depth))
    volumes = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        tokens = tower.patch_embed("T1")(volumes)
        reference.embeddings.forward = lambda pixel_values, **kwargs: tower.encoder.embeddings(pixel_values)
        expected = reference(tokens, output_hidden_states=True).hidden_states[layer][:, special:]
        features = tower({"T1": volumes}).features["T1"]
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)


def test_scans_of_one_modality_are_encoded_as_one_batch(make_model, make_batch):
    model = make_model()
    shapes = []
    model.model.vision_tower.encoder.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    model(**make_batch((2, "T1", 2), (1, "T1", "T1", 2), (1, "dMRI", 2)))
    assert shapes == [(3, 4, 16), (1, 2, 16)]


def test_unknown_modality_raises_with_the_known_ones(make_model, make_batch):
    model, batch = make_model(), make_batch((3, "T1", 2))
    batch["pixel_values"]["T2"] = batch["pixel_values"].pop("T1")
    with pytest.raises(KeyError, match=r"'T2'.*rsfMRI, T1, dMRI"):
        model(**batch)
    with pytest.raises(KeyError, match="'T2'"):
        model.num_image_tokens("T2")


def test_unsupported_encoder_raises(make_model):
    with pytest.raises(ValueError, match=r"'swin'.*siglip_vision_model"):
        make_model(vision_config=SwinConfig(embed_dim=16))


def test_a_model_without_modalities_raises(make_model):
    with pytest.raises(ValueError, match="at least one modality"):
        make_model(modalities={})


def test_patch_embeds_are_named_after_their_modality(make_model):
    names = dict(make_model().named_parameters())
    assert "model.vision_tower.T1_patch_embed.proj.weight" in names
    assert "model.vision_tower.rsfMRI_patch_embed.position_embedding" in names


@pytest.fixture
def sharded_model(make_model, monkeypatch):
    """A model that is treated as sharded, and the recorded calls of its patch embeds, encoder and projector."""
    monkeypatch.setattr("umbrella_model.vision_tower.is_sharded", lambda module: True)
    monkeypatch.setattr("umbrella_model.backbone.is_sharded", lambda module: True)
    model, calls = make_model(), []
    parts = {f"{name}_patch_embed": model.model.vision_tower.patch_embed(name) for name in model.config.modality_order}
    parts |= {"encoder": model.model.vision_tower.encoder, "projector": model.model.multi_modal_projector}
    for name, module in parts.items():
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
    return model, calls


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("row", [(3, "T1", 2), (1, "dMRI", "T1", "rsfMRI", 2), (5,)])
def test_a_sharded_model_makes_the_same_calls_for_every_batch(sharded_model, make_batch, train, row):
    model, calls = sharded_model
    batch = make_batch(row)
    if not batch["pixel_values"]:
        del batch["modality_ids"]
    model.train(train)(**batch)
    embeds = ["rsfMRI_patch_embed", "T1_patch_embed", "dMRI_patch_embed"]
    assert calls == [*embeds, "encoder", "encoder", "encoder", "projector"]


def test_a_sharded_model_gives_equal_logits_and_all_gradients(sharded_model, make_model, make_batch):
    model, _ = sharded_model
    batch = make_batch((3, "T1", 2), (2, "T1", 3))
    out = model(**batch)
    torch.testing.assert_close(out.supervised_logits, make_model()(**batch).supervised_logits)
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert without_gradient(model) == []


def test_decoding_steps_do_not_run_the_vision_tower(sharded_model, make_batch):
    model, calls = sharded_model
    model.eval().generate(**make_batch((3, "T1", 2)), max_new_tokens=4)
    assert calls.count("projector") == 1
