"""LoRA adapters on parts of a model: trainable parameters, saving and loading, and merging."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2Config

from umbrella_model import LoraSettings, UmbrellaForConditionalGeneration, merge_lora, set_trainable
from umbrella_model.lora import has_lora
from umbrella_model.trainable import PARTS

pytest.importorskip("peft")

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (5,))
LAYERS = {
    "patch_embed": 3,
    "vision_tower": 3 * 6,
    "projector": 2,
    "language_model": 2 * 7,
    "embeddings": 2,
}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapt(model, *parts, **settings):
    set_trainable(model, dict.fromkeys(PARTS, "frozen") | dict.fromkeys(parts, "lora"), lora=LoraSettings(**settings))
    return model


def randomise_adapters(model):
    """Sets random adapter weights; new adapters have a product of zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("part", LAYERS)
def test_only_the_adapters_of_a_part_are_trainable(make_model, make_batch, part):
    model = adapt(make_model(), part, rank=2)
    assert len(trainable(model)) == 2 * LAYERS[part]
    assert all(".lora_" in name for name in trainable(model))
    out = model(**make_batch(*ROWS))
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable(model)


def test_lora_preset_trains_patch_embeds_projector_and_language_model_adapters(make_model):
    model = make_model()
    set_trainable(model, "lora")
    prefixes = ("model.vision_tower.T1_", "model.vision_tower.rsfMRI_", "model.vision_tower.dMRI_")
    for name in trainable(model):
        assert name.startswith((*prefixes, "model.multi_modal_projector.")) or ".lora_" in name, name
    assert model.config.lora == {"parts": ["language_model"], "rank": 16, "alpha": 32, "dropout": 0.0}


def test_new_adapters_do_not_change_the_logits(make_model, make_batch):
    model, batch = make_model().eval(), make_batch(*ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(adapt(model, *PARTS)(**batch).logits, expected)


def test_parts_without_adapters_keep_requires_grad(make_model):
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    set_trainable(model, {"language_model": "lora"})
    assert not model.lm_head.weight.requires_grad
    assert model.model.multi_modal_projector.linear_1.weight.requires_grad
    assert not model.model.language_model.norm.weight.requires_grad


def test_dummy_terms_count_only_adapters(make_model, make_batch):
    model = adapt(make_model(), "patch_embed", rank=2)
    randomise_adapters(model)
    config = model.config.patch_embeds["rsfMRI"]
    assert model.dummy_sizes()["rsfMRI"] == 2 * (config.patch_elements + 16)
    term = model(**make_batch((3, "T1", 2))).dummy_terms["rsfMRI"]
    adapters = [p for n, p in model.named_parameters() if "rsfMRI_patch_embed.proj.lora_" in n]
    torch.testing.assert_close(term, sum(p.sum() for p in adapters) / model.dummy_sizes()["rsfMRI"] ** 0.5)
    term.backward()
    assert torch.cat([p.grad.flatten() for p in adapters]).norm().item() == pytest.approx(1.0)


def test_a_model_with_adapters_saves_and_reloads(make_model, make_batch, tmp_path):
    model = adapt(make_model().eval(), "language_model", "vision_tower", rank=3, alpha=5)
    randomise_adapters(model)
    model.save_pretrained(tmp_path)
    assert any(".lora_A." in key for key in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = make_batch(*ROWS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    assert trainable(adapt(loaded, "language_model", "vision_tower", rank=3, alpha=5)) == trainable(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_base_weights_are_frozen_and_adapters_kept_after_reload(make_model, make_batch, tmp_path):
    model = make_model()
    set_trainable(model, {"language_model": "lora", "embeddings": "frozen"}, lora=LoraSettings(rank=4, alpha=8))
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    embeddings = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert trainable(loaded) == trainable(model) | embeddings
    set_trainable(loaded, {"language_model": "lora", "embeddings": "frozen"})
    assert trainable(loaded) == trainable(model)
    assert loaded.config.lora == {"parts": ["language_model"], "rank": 4, "alpha": 8, "dropout": 0.0}
    with pytest.raises(ValueError, match=r"'language_model'.*'rank': 4.*'projector'.*merge_lora"):
        set_trainable(loaded, {"projector": "lora"})


@pytest.mark.isolated
@pytest.mark.parametrize("parts", [("language_model",), PARTS])
def test_a_merged_model_gives_equal_logits_and_loads_without_peft(make_model, make_batch, tmp_path, monkeypatch, parts):
    plain = set(make_model().state_dict())
    model = adapt(make_model().double().eval(), *parts, rank=3)  # float64: merging rounds
    randomise_adapters(model)
    batch = make_batch(*ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        merge_lora(model)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert not has_lora(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == plain
    assert loaded.config.lora is None
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_generation_and_checkpointing_work_with_adapters(make_model, make_batch):
    model = adapt(make_model(), "language_model", rank=2)
    randomise_adapters(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out = model(**make_batch(*ROWS))
    out.loss.backward()
    ids = model.eval().generate(**make_batch(*ROWS, padding_side="left"), max_new_tokens=3, do_sample=False)
    merge_lora(model)
    merged = model.generate(**make_batch(*ROWS, padding_side="left"), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, merged)


def test_other_adapters_and_training_adapted_parts_raise(make_model):
    model = adapt(make_model(), "language_model", rank=2)
    with pytest.raises(ValueError, match=r"'rank': 2.*'rank': 4.*merge_lora"):
        adapt(model, "language_model", rank=4)
    with pytest.raises(ValueError, match=r"language_model .*'train'.*merge_lora"):
        set_trainable(model, "full")


def test_adapters_on_tied_embeddings_raise(make_model):
    text = Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = make_model(text_config=text)
    with pytest.raises(ValueError, match=r"embeddings: .*tied"):
        set_trainable(model, {"embeddings": "lora"})
    set_trainable(model, {"language_model": "lora"})
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.isolated
def test_lora_raises_without_peft(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        set_trainable(make_model(), "lora")


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_invalid_lora_settings_raise(settings):
    with pytest.raises(ValueError, match="positive"):
        LoraSettings(**settings)


def test_resizing_adapted_embeddings_raises_until_merged(make_model):
    model = make_model()
    set_trainable(model, {"embeddings": "lora"})
    with pytest.raises(ValueError, match=r"set_trainable.*merge_lora"):
        model.resize_token_embeddings(70)
    merge_lora(model)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape == (70, 16)
    set_trainable(model, {"language_model": "lora"})
    assert model.resize_token_embeddings(72).num_embeddings == 72
