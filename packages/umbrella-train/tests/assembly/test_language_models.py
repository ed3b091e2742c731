"""Language models of one's own in a configuration: what cannot be used is one message with its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import train

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
Configured = Callable[..., RunConfig]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """The folder of a language model with its tokenizer and tied embeddings."""
    tokenizer = build_byte_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(**SIZES, **special, vocab_size=len(tokenizer), tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def configured(make_config: Configured, words: Path, tmp_path: Path) -> Configured:
    """A run with that language model; keywords are further keys of `model`."""

    def make(**model: Any) -> RunConfig:
        given = {"text_config": None, "vision_feature_layer": None, "language_model": str(words)}
        return make_config(tmp_path / "runs", model=given | model, data={"evaluation": []}, trainer={"max_steps": 1})

    return make


def edit_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


QUANTISED = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [({"intermediate_size": 48}, "shape mismatch"), ({"num_hidden_layers": 2}, "missing"), (QUANTISED, "AWQ")],
    ids=["other-sizes", "more-layers", "quantised"],
)
def test_weights_that_cannot_be_used_are_one_message_with_key_and_folder(
    entries: dict[str, Any], reason: str, configured: Configured, words: Path
) -> None:
    edit_config(words, **entries)
    with pytest.raises(RunError, match=rf"^model\.language_model: the weights of {words} [\s\S]*{reason}"):
        build_components(configured())


def test_adapters_on_tied_embeddings_are_rejected_with_their_key(configured: Configured) -> None:
    pytest.importorskip("peft")
    with pytest.raises(RunError, match=r"^model\.learn: embeddings: .*tied"):
        build_components(configured(learn={"preset": "lora", "embeddings": "lora"}))


def test_a_tokenizer_with_other_ids_than_those_of_the_language_model_is_rejected(
    configured: Configured, words: Path, tmp_path: Path
) -> None:
    """Every word would have the embedding of another one."""
    tokenizer = build_byte_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match=rf"^model\.tokenizer: its id of '[ab]' differs .*{words}"):
        build_components(configured(tokenizer=str(tmp_path / "other")))
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(tmp_path / "more")
    model = build_components(configured(tokenizer=str(tmp_path / "more"))).model
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_the_own_tokenizer_of_a_language_model_may_be_damaged_if_another_is_given(
    configured: Configured, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_byte_tokenizer().save_pretrained(tmp_path / "other")
    (words / "tokenizer.json").write_text('{"model": 3}')
    assert build_components(configured(tokenizer=str(tmp_path / "other"))).tokenizer.pad_token == "<|pad|>"
    assert f"{words}: has no tokenizer that can be read" in caplog.text


def test_a_run_is_saved_whatever_the_generation_config_of_the_language_model(
    configured: Configured, words: Path
) -> None:
    """transformers loads a temperature without sampling, and does not save it."""
    content = {"temperature": 0.6, "eos_token_id": 256}
    (words / "generation_config.json").write_text(json.dumps(content))
    folder = train(configured())
    assert folder is not None
    saved = GenerationConfig.from_pretrained(folder / "model")
    assert (saved.temperature, saved.eos_token_id) == (None, 256)
