"""Saving and loading: order of modalities, parameters, buffers, Auto classes, and mismatched keys."""

from __future__ import annotations

import contextlib
import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, Qwen2Config

from umbrella_model import (
    PatchEmbedConfig,
    UmbrellaConfig,
    UmbrellaForConditionalGeneration,
    UmbrellaModel,
    set_trainable,
)

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (5,))


@pytest.fixture
def saved(make_model, tmp_path):
    """A saved model whose parameters differ from their initial values."""
    model = make_model(vision_feature_layer=-2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_reloaded_model_gives_equal_logits(saved, make_batch):
    model, folder = saved
    loaded, info = UmbrellaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert loaded.config.modality_order == ["rsfMRI", "T1", "dMRI"]
    assert loaded.model.vision_tower.modality_order == ("rsfMRI", "T1", "dMRI")
    batch = make_batch(*ROWS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_config_without_the_keys_that_were_added_later_loads_as_before(make_model, make_batch, tmp_path):
    # As an older version wrote it: the default of a new key is what the model did before there was the key.
    before = {"projector": "mlp", "vision_final_norm": False, "lora": None}
    model, folder = make_model(vision_feature_layer=-2, **before).eval(), tmp_path
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for key in before:
        content.pop(key)
    for modality in content["modalities"].values():
        modality.pop("pool")
    (folder / "config.json").write_text(json.dumps(content))
    loaded = UmbrellaForConditionalGeneration.from_pretrained(folder)
    assert loaded.config.modalities == model.config.modalities
    batch = make_batch(*ROWS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_parameters_and_buffers_are_bit_identical_after_reload(saved):
    model, folder = saved
    loaded = UmbrellaForConditionalGeneration.from_pretrained(folder)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert ours.keys() == theirs.keys()
        assert ours
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor), name


def test_modalities_of_equal_shape_keep_their_tags_after_reload(make_model, make_batch, tmp_path):
    same = PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8))
    modalities = {"T2": same, "T1": same, "FLAIR": same}
    model = make_model(modalities=modalities).eval()
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    batch = make_batch((2, "T2", "FLAIR", 2), (1, "T1", 2), modalities=modalities)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_auto_classes_load_the_model(saved):
    _, folder = saved
    assert isinstance(AutoConfig.from_pretrained(folder), UmbrellaConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), UmbrellaForConditionalGeneration)
    assert isinstance(AutoModel.from_config(AutoConfig.from_pretrained(folder)), UmbrellaModel)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["UmbrellaForConditionalGeneration"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (LlavaConfig, r"'llava' checkpoint.*from_llava\(\.\.\., modalities=\.\.\.\)"),
        (Qwen2Config, r"'qwen2' checkpoint.*save_pretrained"),
    ],
)
@pytest.mark.parametrize("kind", [UmbrellaConfig, UmbrellaForConditionalGeneration])
def test_loading_another_model_type_raises(tmp_path, kind, other, message):
    other().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path)


def test_keys_of_removed_encoder_modules_are_not_saved(saved):
    _, folder = saved
    keys = load_file(folder / "model.safetensors").keys()
    assert any(key.endswith("vision_tower.T1_patch_embed.proj.weight") for key in keys)
    assert not any(
        "post_layernorm" in key or ".head." in key or "layers.2.self_attn.k_proj.bias" in key for key in keys
    )


@pytest.fixture
def mismatched(saved):
    """A checkpoint with one missing and one unexpected key."""
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("T1_patch_embed.position_embedding"))
    del tensors[name]
    tensors["model.vision_tower.T2_patch_embed.proj.bias"] = torch.zeros(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "kind", [UmbrellaForConditionalGeneration, AutoModelForImageTextToText, UmbrellaModel, AutoModel]
)
def test_missing_and_unexpected_keys_raise(mismatched, kind):
    with pytest.raises(ValueError, match="2 keys") as error:
        kind.from_pretrained(mismatched)
    message = str(error.value)
    assert re.search(r"missing in the checkpoint: \S*vision_tower.T1_patch_embed.position", message)
    assert re.search(r"not in the model: \S*vision_tower.T2_patch_embed.proj.bias", message)


def test_shape_mismatch_raises_with_both_shapes(saved, make_config):
    _, folder = saved
    config = make_config(vision_feature_layer=-2)
    config.text_config.vocab_size = 65
    with pytest.raises(ValueError, match=r"lm_head\.weight .*\(64, 16\) .*\(65, 16\)"):
        UmbrellaForConditionalGeneration.from_pretrained(folder, config=config)


def test_backbone_loads_from_a_full_checkpoint_and_from_its_own(saved, make_batch, tmp_path_factory):
    model, folder = saved
    batch = {name: value for name, value in make_batch(*ROWS).items() if name != "labels"}
    own = tmp_path_factory.mktemp("backbone")
    backbone = AutoModel.from_pretrained(folder)
    backbone.save_pretrained(own)
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
        for loaded in (backbone, UmbrellaModel.from_pretrained(own)):
            assert torch.equal(loaded(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_load_report_of_transformers_is_muted_when_strict(mismatched, strict):
    messages = []
    handler = type("Handler", (logging.Handler,), {"emit": lambda self, record: messages.append(record.getMessage())})()
    source = logging.getLogger("transformers.modeling_utils")
    source.addHandler(handler)
    try:
        with contextlib.suppress(ValueError):
            UmbrellaForConditionalGeneration.from_pretrained(mismatched, strict=strict)
    finally:
        source.removeHandler(handler)
    assert any("can be ignored" in message for message in messages) is not strict


def test_unexpected_head_tensor_raises_for_the_full_model(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.bias": torch.zeros(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not in the model: lm_head\.bias"):
        UmbrellaForConditionalGeneration.from_pretrained(folder)


def test_missing_patch_embed_is_initialised_when_not_strict(mismatched):
    loaded, info = UmbrellaForConditionalGeneration.from_pretrained(mismatched, strict=False, output_loading_info=True)
    assert {key.split("vision_tower.")[1] for key in info["missing_keys"]} == {"T1_patch_embed.position_embedding"}
    assert {key.split("vision_tower.")[1] for key in info["unexpected_keys"]} == {"T2_patch_embed.proj.bias"}
    from umbrella_model.positions import sincos_position_embedding

    assert torch.equal(
        loaded.model.vision_tower.T1_patch_embed.position_embedding, sincos_position_embedding((2, 2, 1), 16)
    )


def test_mismatched_tensor_is_initialised_when_not_strict(saved):
    old, folder = saved
    modalities = {**old.config.modalities, "T1": PatchEmbedConfig((8, 8, 8), (4, 4, 4))}
    loaded, info = UmbrellaForConditionalGeneration.from_pretrained(
        folder, modalities=modalities, strict=False, output_loading_info=True
    )
    assert {key.split("vision_tower.")[1] for key, *_ in info["mismatched_keys"]} == {
        "T1_patch_embed.proj.weight",
        "T1_patch_embed.position_embedding",
    }
    assert loaded.num_image_tokens("T1") == 8


def test_adding_a_modality_to_adapted_patch_embeds_raises(saved, tmp_path):
    pytest.importorskip("peft")
    old, folder = saved
    model = UmbrellaForConditionalGeneration.from_pretrained(folder)
    set_trainable(model, {"patch_embed": "lora"})
    model.save_pretrained(tmp_path)
    modalities = {**old.config.modalities, "FLAIR": PatchEmbedConfig((8, 8, 8), (4, 4, 4))}
    with pytest.raises(ValueError, match=r"FLAIR_patch_embed\.\S+ .*merge_lora"):
        UmbrellaForConditionalGeneration.from_pretrained(tmp_path, modalities=modalities, strict=False)


def test_an_added_modality_gets_the_last_tag_also_after_reload(saved, make_batch, tmp_path_factory):
    old, folder = saved
    modalities = {"FLAIR": PatchEmbedConfig((8, 8, 8), (4, 4, 4)), **old.config.modalities}
    model, info = UmbrellaForConditionalGeneration.from_pretrained(
        folder, modalities=modalities, strict=False, output_loading_info=True
    )
    assert all(".FLAIR_patch_embed." in key for key in info["missing_keys"])
    order = ["rsfMRI", "T1", "dMRI", "FLAIR"]
    target = tmp_path_factory.mktemp("four")
    model.save_pretrained(target)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(target)
    for each in (model, loaded):
        assert each.config.modality_order == list(each.model.vision_tower.modality_order) == order
    with torch.no_grad():
        assert torch.equal(loaded(**make_batch(*ROWS)).logits, old(**make_batch(*ROWS)).logits)
        both = make_batch((2, "FLAIR", "dMRI", 1), modalities=loaded.config.modalities)
        assert torch.equal(loaded(**both).logits, model(**both).logits)


def test_saving_raises_when_the_config_has_other_modalities(make_model, tmp_path):
    model = make_model()
    model.config.modalities["FLAIR"] = PatchEmbedConfig((8, 8, 8), (4, 4, 4))
    with pytest.raises(ValueError, match=r"'FLAIR'.*strict=False"):
        model.save_pretrained(tmp_path)


def test_patch_embeds_keep_their_own_initialisation(make_model):
    patch_embed = make_model().model.vision_tower.rsfMRI_patch_embed
    assert patch_embed.proj.weight.std().item() == pytest.approx(patch_embed.config.patch_elements**-0.5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_in_a_dtype(saved, make_batch, dtype):
    model, folder = saved
    loaded = UmbrellaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    batch = make_batch(*ROWS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, atol=0.1, rtol=0.05, check_dtype=False)


def test_tied_embeddings_are_tied_after_reload(make_model, tmp_path):
    text = Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    make_model(text_config=text).save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
