"""from_parts(): text equals the language model's own for every family, and composed models save, load and generate."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlavaConfig, PreTrainedTokenizerFast, T5Config
from transformers.utils.quantization_config import GgufConfig

from umbrella_model import (
    PatchEmbedConfig,
    UmbrellaForConditionalGeneration,
    load_vision_encoder,
    pack_batch,
    set_trainable,
)
from umbrella_model.packing import check_supports_packing

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = SIZES | {"num_key_value_heads": 1}
# Model type and what its small config needs; tied and untied embeddings, biased heads, scaled and limited logits.
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "mistral": GROUPED | {"sliding_window": 4},
    "phi3": GROUPED,
    "phi": SIZES,
    "smollm3": GROUPED,
    "olmo2": GROUPED,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": SIZES,
    "granite": GROUPED | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "tie_word_embeddings": True},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
            "word_embed_proj_dim": 16},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "mixtral": GROUPED,
    "phimoe": GROUPED | {"num_local_experts": 4},
    "falcon": SIZES,
    "falcon_h1": GROUPED | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
}  # fmt: skip
# They cannot be composed: MiniMax needs a cache of its own, DeepSeek 4 chooses experts by token id, and Llama 4 is its
# own base model.
REJECTED = {
    "minimax": GROUPED | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": GROUPED | {"n_routed_experts": 8, "head_dim": 8, "qk_rope_head_dim": 4, "q_lora_rank": 8},
    "llama4_text": GROUPED | {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2},
}
# A recurrent state in Falcon-H1; OPT counts positions over the whole row; Falcon's attention ignores boundaries.
MIXING = {"falcon", "falcon_h1", "opt"}
MODALITIES = {
    "rsfMRI": PatchEmbedConfig(image_size=(8, 8, 8, 4), patch_size=(4, 4, 8, 2)),
    "T1": PatchEmbedConfig(image_size=(8, 8, 8), patch_size=(4, 4, 8)),
    "dMRI": PatchEmbedConfig(image_size=(8, 8, 4), patch_size=(4, 8, 4), in_channels=2),
}
VISION = SIZES | {"image_size": 16, "patch_size": 4}


def language_config(kind, **options):
    common = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(
        kind, **((FAMILIES | REJECTED)[kind] | common | {"max_position_embeddings": 64} | options)
    )


def language_model(kind, **options):
    """Random weights, also where the initialisation has zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(language_config(kind, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def vision_config(kind="siglip_vision_model"):
    return AutoConfig.for_model(kind, **VISION)


def make_tokenizer(*, num_tokens, special=("<|image|>", "<|im_start|>", "<|im_end|>"), template="{{ messages }}"):
    """Words and, at the end, special tokens."""
    words = {f"w{number}": number for number in range(num_tokens - len(special))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0"
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def compose(language, *, num_tokens=64, **options):
    settings = {"vision_encoder": vision_config(), "modalities": MODALITIES} | options
    if "tokenizer" not in settings:
        settings["tokenizer"] = make_tokenizer(num_tokens=num_tokens)
    return UmbrellaForConditionalGeneration.from_parts(language_model=language, **settings)


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_is_the_language_models_own(kind, tmp_path):
    language = language_model(kind)
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left, as for generation
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = language(ids).logits
        answer = language.generate(ids, attention_mask=mask, **options)
    model = compose(language)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), answer)
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    is_tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert is_tied == (language.lm_head.weight is language.get_input_embeddings().weight)
    assert is_tied == loaded.config.text_config.tie_word_embeddings


@pytest.mark.parametrize("kind", FAMILIES)
def test_new_tokens_leave_the_logits_of_the_others(kind, tmp_path):
    language = language_model(kind)
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = language(ids).logits
        table = language.get_input_embeddings().weight.clone()
    model = compose(language, num_tokens=67)
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert embedding.num_embeddings == head.out_features == model.config.text_config.vocab_size == 67
    assert torch.equal(embedding.weight[:64], table)
    torch.testing.assert_close(embedding.weight[64:], table.mean(dim=0).expand(3, -1))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :64], expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_learns_from_scans(kind, make_batch):
    # Not the key and value biases of some families, on which softmax does not depend; nor unused positions and experts.
    model = compose(language_model(kind)).train()
    batch = make_batch((3, "T1", 4), (2, "rsfMRI", 3), modalities=MODALITIES)
    batch["input_ids"][batch["input_ids"] == 60] = model.config.image_token_id
    output = model(**batch)
    (output.loss + sum(output.dummy_terms.values())).backward()
    assert list(output.dummy_terms) == ["dMRI"]
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    scans = [p.grad for name, p in model.named_parameters() if ".T1_patch_embed." in name or "_projector." in name]
    assert all(gradient.abs().max() > 0 for gradient in scans)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_packed_conversations_are_separate_or_the_model_is_rejected(kind, attention):
    model = compose(language_model(kind), attn_implementation=attention)
    if kind in MIXING:
        with pytest.raises(ValueError, match=kind):
            check_supports_packing(model)
        return
    check_supports_packing(model)
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 7, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
    }
    with torch.no_grad():
        packed = model(**pack_batch(rows)).logits[0]
        alone = model(input_ids=rows["input_ids"][1:, :3]).logits[0]
    torch.testing.assert_close(packed[4:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_lora_adapts_linear_layers_of_every_language_model(kind, make_batch):
    model = compose(language_model(kind)).train()
    set_trainable(model, "lora")
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" in name}
    # Not positions, which are in a torch embedding.
    assert adapters
    assert not [name for name in adapters if "wpe" in name or "embed_positions" in name]
    batch = make_batch((3, "T1", 4), (2, "rsfMRI", 3), modalities=MODALITIES)
    batch["input_ids"][batch["input_ids"] == 60] = model.config.image_token_id
    model(**batch).loss.backward()
    assert adapters <= {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["gpt2", "granite", "olmo2", "opt", "phi"])
def test_varlen_in_training_equals_sdpa(kind, make_batch):
    # Without dropout: in training mode that is random.
    options = {"dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = compose(language_model(kind, **options)).train()
    batch = make_batch((3, "T1", 4), (2, "rsfMRI", 3), modalities=MODALITIES)
    batch["input_ids"][batch["input_ids"] == 60] = model.config.image_token_id
    model.set_attn_implementation({"text_config": "sdpa"})
    expected = model(**batch).loss
    model.set_attn_implementation({"text_config": "varlen"})
    torch.testing.assert_close(model(**batch).loss, expected, atol=1e-5, rtol=1e-5)


MATRIX = {
    "kind": ["llama", "gpt2", "granite", "gemma3_text"],
    "encoder": ["siglip_vision_model", "clip_vision_model", "vit"],
    "projector": ["mlp", "linear"],
    "layer": [None, -2],
    "learn": ["full", "lora", "align"],
    "num_tokens": [64, 70],
}


def _pairs(chosen):
    names = sorted(chosen)
    return {(a, chosen[a], b, chosen[b]) for number, a in enumerate(names) for b in names[number + 1 :]}


def _pairwise():
    candidates = [dict(zip(MATRIX, values, strict=True)) for values in product(*MATRIX.values())]
    left, rows = set().union(*map(_pairs, candidates)), []
    while left:
        rows.append(max(candidates, key=lambda each: len(left & _pairs(each))))
        left -= _pairs(rows[-1])
    return rows


@pytest.mark.parametrize("case", _pairwise(), ids=lambda case: "-".join(map(str, case.values())))
def test_composed_models_train_save_load_and_generate(case, make_batch, tmp_path):
    torch.manual_seed(0)
    model = compose(
        language_model(case["kind"]),
        vision_encoder=vision_config(case["encoder"]),
        projector=case["projector"],
        vision_feature_layer=case["layer"],
        num_tokens=case["num_tokens"],
    )
    set_trainable(model, case["learn"])
    batch = make_batch((3, "T1", 4), (2, "dMRI", 3), modalities=MODALITIES, padding_side="left")
    batch["input_ids"][batch["input_ids"] == 60] = model.config.image_token_id
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = model.train()(**batch)
    (output.loss + 1e-7 * sum(output.dummy_terms.values())).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("T1_patch_embed" in name for name in changed)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask", "modality_ids", "pixel_values")}
    with torch.no_grad():
        logits = model(**prompt).logits
        torch.testing.assert_close(loaded(**prompt).logits, logits, atol=0, rtol=0)
    new = loaded.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(new[:, batch["input_ids"].shape[1]], logits[:, -1].argmax(dim=-1))


def test_without_a_tokenizer_the_image_token_is_a_new_row():
    model = compose(language_model("llama"), tokenizer=None)
    assert model.config.image_token_id == 64
    assert model.get_input_embeddings().num_embeddings == 65


@pytest.mark.parametrize("known", ["<image>", "<|image_pad|>", "<|image|>"])
def test_an_image_token_of_the_tokenizer_is_used(known):
    tokenizer = make_tokenizer(num_tokens=64, special=(known, "<|other|>"))
    model = compose(language_model("llama"), tokenizer=tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(known) == 62
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 64


def test_the_image_token_is_added_and_special_tokens_and_template_are_kept():
    tokenizer = make_tokenizer(num_tokens=64, special=("<|other|>",))
    before = tokenizer.special_tokens_map
    model = compose(language_model("llama"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<|image|>"
    assert model.config.image_token_id == 64
    assert tokenizer.special_tokens_map == before
    assert "<|other|>" in tokenizer.get_added_vocab()
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("<|image|>", add_special_tokens=False) == [64]


def test_an_image_token_among_the_words_becomes_a_special_token():
    """Otherwise a run would be rejected: the token of the scans must be one that text cannot have by chance."""
    words = {f"w{number}": number for number in range(60)} | {"<|image|>": 60}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.chat_template = "{{ messages }}"
    model = compose(language_model("llama"), tokenizer=tokenizer)
    assert model.config.image_token_id == 60
    assert tokenizer.added_tokens_decoder[60].special
    assert tokenizer.encode("w1<|image|>w2") == [1, 60, 2]
    assert model.get_input_embeddings().num_embeddings == 64


def test_chatml_is_used_without_a_template(caplog):
    tokenizer = make_tokenizer(num_tokens=64, special=("<|image|>",), template=None)
    with caplog.at_level(logging.WARNING):
        model = compose(language_model("llama"), tokenizer=tokenizer)
    assert "ChatML" in caplog.text
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\n"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 66


class Ignorant(AutoModelForCausalLM._model_mapping[type(language_config("llama"))]):
    """A language model that does not pass the embeddings on."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=torch.ones_like(input_ids), **kwargs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (LlavaConfig(), "llava"),
        (BertConfig(**SIZES, vocab_size=64), "BertLMHeadModel"),
        (AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=64), "MambaForCausalLM"),
        (lambda: Ignorant(language_config("llama")), "Ignorant"),
        (lambda: language_model("llama").model, "LlamaModel"),
        (lambda: language_model("opt", word_embed_proj_dim=8), "OPTForCausalLM"),
    ],
    ids=["t5", "llava", "bert", "mamba", "ignorant", "no-head", "narrow-embeddings"],
)
def test_other_models_are_rejected_by_name(source, message):
    with pytest.raises(ValueError, match=message):
        compose(source() if callable(source) else source)


def test_a_scan_must_fit_into_the_positions():
    with pytest.raises(ValueError, match="rsfMRI"):
        compose(language_config("gpt2", max_position_embeddings=8))


def with_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: None, "NoneType"),
        (lambda: with_adapters(language_model("llama")), "merge_and_unload"),
        (lambda: language_model("minimax"), "MiniMaxForCausalLM"),
        (lambda: language_model("deepseek_v4"), "DeepseekV4ForCausalLM"),
        (lambda: language_model("llama4_text"), "Llama4ForCausalLM"),
    ],
    ids=["module", "none", "adapters", "own-cache", "token-ids", "not-its-base-model"],
)
def test_what_cannot_be_a_language_model_is_rejected_by_name(source, message):
    with pytest.raises(ValueError, match=message):
        compose(source())


def test_a_model_that_its_config_does_not_describe_is_rejected():
    """It would be saved, and not load."""
    language = language_model("llama")
    language.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"LlamaModel.*mlp\.extra"):
        compose(language)


@pytest.mark.parametrize("source", [None, 3])
def test_what_cannot_be_a_vision_encoder_is_rejected_by_type(source):
    with pytest.raises(ValueError, match=type(source).__name__):
        compose(language_config("llama"), vision_encoder=source)


@pytest.mark.parametrize("part", ["language_model", "vision_encoder"])
def test_a_missing_path_is_named(part, tmp_path):
    for name in ("folder", "file.gguf", "file.pth"):
        with pytest.raises(FileNotFoundError, match=f"{part} is .*{name}"):
            compose(**{"language": language_config("llama")} | {part.replace("_model", ""): tmp_path / name})


@pytest.mark.parametrize("source", [str, lambda folder: folder])
def test_a_folder_with_adapters_alone_is_rejected(source, tmp_path):
    with_adapters(language_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapters alone.*merge_and_unload"):
        compose(source(tmp_path))


def test_a_trained_model_is_not_a_language_model(tmp_path):
    compose(language_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained"):
        compose(tmp_path)


@pytest.mark.parametrize("options", [{"vision_feature_layer": -1}, {"vision_num_heads": 2}])
def test_options_of_a_loaded_encoder_are_given_when_it_is_loaded(options):
    encoder = load_vision_encoder(vision_config(), feature_layer=None)
    with pytest.raises(ValueError, match="load_vision_encoder"):
        compose(language_config("llama"), vision_encoder=encoder, **options)


def test_the_marks_of_a_gguf_file_are_not_saved(tmp_path):
    """transformers marks a model from a GGUF file as quantised, although its weights are not."""
    language = language_model("llama")
    language.config.quantization_config = GgufConfig()
    model = compose(language)
    assert "quantization_config" not in model.config.text_config.to_dict()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("option", ["init", "projector"])
def test_unknown_options_raise(option):
    with pytest.raises(ValueError, match=option):
        compose(language_config("llama"), **{option: "other"})


def test_parts_are_loaded_from_folders(tmp_path):
    language, words = language_model("llama"), tmp_path / "words"
    language.save_pretrained(words)
    model = compose(words, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, language.lm_head.weight.bfloat16())
    assert compose(str(words)).dtype == torch.float32


def test_weights_are_in_memory_and_not_mapped_from_the_file(tmp_path):
    """A mapped parameter would change with its file."""
    compose(language_model("llama")).save_pretrained(tmp_path)
    model = UmbrellaForConditionalGeneration.from_pretrained(tmp_path)
    value = model.lm_head.weight.clone()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(file.stat().st_size // 2))
    assert torch.equal(model.lm_head.weight, value)
    assert all(torch.equal(p, p) for p in model.parameters())
