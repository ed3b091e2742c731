"""Language models as they are published: incomplete folders, contradictory configs, generation configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig

from umbrella_model import PatchEmbedConfig, UmbrellaForConditionalGeneration
from umbrella_model.language_model import load_language_model
from umbrella_model.vision_encoder import load_vision_encoder

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)
MODALITIES = {"T1": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8))}
IDS = torch.randint(1, 60, (1, 9), generator=torch.Generator().manual_seed(1))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    words = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | words | {"max_position_embeddings": 4096} | options)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def compose(language: Any, **options: Any) -> UmbrellaForConditionalGeneration:
    return UmbrellaForConditionalGeneration.from_parts(
        language_model=language, vision_encoder=VISION, modalities=MODALITIES, **options
    )


def edit_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def drop_layer(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "layers.1" not in key}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (llama().model.save_pretrained, r"missing in the checkpoint: lm_head\.weight"),
        (drop_layer, r"missing in the checkpoint: model\.layers\.1\."),
        (lambda folder: edit_config(folder, num_hidden_layers=3), r"missing in the checkpoint: model\.layers\.2\."),
        (lambda folder: edit_config(folder, intermediate_size=48), r"shape mismatch: model\.layers\.0\.mlp\.down_proj"),
    ],
    ids=["without-its-head", "without-a-layer", "config-has-more-layers", "config-has-other-sizes"],
)
def test_a_folder_without_all_weights_is_rejected(damage: Any, key: str, tmp_path: Path) -> None:
    """transformers only warns, and the model would have random weights."""
    llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: [\s\S]*{key}"):
        load_language_model(tmp_path)


def test_tensors_that_are_not_read_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"value_head.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert torch.equal(load_language_model(tmp_path)(IDS).logits, llama()(IDS).logits)
    assert "value_head.weight" in caplog.text


def test_a_head_of_its_own_is_kept_although_the_config_says_tied(tmp_path: Path) -> None:
    language = llama()
    language.save_pretrained(tmp_path / "words")
    edit_config(tmp_path / "words", tie_word_embeddings=True)
    model = compose(tmp_path / "words")
    assert model.get_input_embeddings().num_embeddings == 65
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits[..., :64], language(IDS).logits, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "model")
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert not loaded.config.tie_word_embeddings


@pytest.mark.parametrize("source", ["module", "config"])
def test_rotary_frequencies_are_not_rounded_to_half_precision(source: str, tmp_path: Path) -> None:
    """As in a model that is loaded in half precision; rounded ones are wrong by radians at late positions."""
    model = compose(llama() if source == "module" else llama().config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = llama().model.rotary_emb.inv_freq
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, exact)
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    ids = IDS.repeat(1, 50)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("option", [{"temperature": 0.6}, {"prompt_lookup_num_tokens": 3}])
def test_a_generation_config_that_cannot_be_saved_or_used_is_reduced(
    option: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    language = llama()
    language.generation_config = GenerationConfig(eos_token_id=[5, 6], pad_token_id=0, **option)
    model = compose(language)
    assert next(iter(option)) in caplog.text
    assert model.generation_config.eos_token_id == [5, 6]
    model.save_pretrained(tmp_path)
    assert model.generate(IDS, max_new_tokens=2, eos_token_id=None).shape == (1, 11)


def test_a_valid_generation_config_is_kept() -> None:
    language = llama()
    language.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, repetition_penalty=5.0, pad_token_id=0
    )
    expected = language.generate(IDS, max_new_tokens=8, do_sample=False)
    model = compose(language)
    assert model.generation_config.temperature == 0.6
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (load_language_model, "AutoModelForCausalLM"),
        (lambda folder: load_vision_encoder(folder, feature_layer=None), "AutoModel"),
        (lambda folder: UmbrellaForConditionalGeneration.from_llava(folder, modalities=MODALITIES), "AutoModel"),
    ],
    ids=["language-model", "vision-encoder", "llava"],
)
def test_code_of_a_folder_is_not_run_nor_asked_about(
    load: Callable[[str], Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", kind: "theirs.Model"}})
    )
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="execute"):
        load(str(tmp_path))
    assert asked == []
    assert not (tmp_path / "ran").exists()
