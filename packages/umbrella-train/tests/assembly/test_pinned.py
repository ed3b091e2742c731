"""Sources on the hub with a revision: read from a cache laid out as the hub's, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from umbrella_train.assembly import pinned
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import train

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
REVISIONS = {"main": "0" * 40, "v1": "1" * 40, "refs/pr/1": "2" * 40}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two repositories, whose weights are all equal to 1, 2 or 3 by revision."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = build_byte_tokenizer()
    language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    encoder = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=4))
    for value, (revision, commit) in enumerate(REVISIONS.items(), 1):
        for name, model in (("language", language), ("encoder", encoder)):
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, value)
            repository = folder / f"models--owner--{name}"
            model.save_pretrained(repository / "snapshots" / commit)
            tokenizer.save_pretrained(repository / "snapshots" / commit)
            ref = repository / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    return folder


@pytest.fixture(autouse=True)
def offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up in that cache alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def trained(hub: Path, make_config: Callable[..., RunConfig], tmp_path: Path) -> str:
    """A repository with the model of an earlier run."""
    repository = hub / "models--owner--run"
    components = build_components(make_config(tmp_path))
    components.model.save_pretrained(repository / "snapshots" / REVISIONS["v1"])
    components.processor().save_pretrained(repository / "snapshots" / REVISIONS["v1"])
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/v1").write_text(REVISIONS["v1"])
    return "owner/run@v1"


def config_of(**model: Any) -> RunConfig:
    modalities = {"T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}}
    return RunConfig.model_validate({"model": {"modalities": modalities, **model}, "data": {"synthetic": {}}})


@pytest.mark.parametrize(("revision", "value"), [("main", 1), ("v1", 2), ("refs/pr/1", 3), ("2" * 40, 3)])
def test_parts_have_the_weights_of_their_revisions(revision: str, value: int) -> None:
    config = config_of(language_model=f"owner/language@{revision}", vision_encoder="owner/encoder@v1")
    model: Any = build_components(config).model.model
    assert set(model.language_model.layers[0].mlp.up_proj.weight.unique().tolist()) == {value}
    assert set(model.vision_tower.encoder.encoder.layers[0].mlp.fc1.weight.unique().tolist()) == {2}
    assert config.model.language_model == f"owner/language@{revision}"


def test_tokenizer_has_a_revision() -> None:
    text = {"model_type": "llama", **SIZES}
    config = config_of(tokenizer="owner/language@v1", vision_encoder="owner/encoder@main", text_config=text)
    assert len(build_components(config).tokenizer) == len(build_byte_tokenizer())


@pytest.mark.parametrize("key", ["language_model", "vision_encoder", "tokenizer"])
def test_unknown_revision_names_key_and_source(key: str) -> None:
    sources = {"language_model": "owner/language@main", "vision_encoder": "owner/encoder@main"}
    with pytest.raises(RunError, match=f"model.{key}: .*owner/language@v9"):
        build_components(config_of(**{**sources, key: "owner/language@v9"}))


def test_unknown_revision_of_a_llava() -> None:
    with pytest.raises(RunError, match=r"model.pretrained: .*owner/nothing@main"):
        build_components(config_of(pretrained="owner/nothing@main"))


def test_a_run_starts_from_a_revision_of_a_trained_model(
    trained: str, make_config: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = dict.fromkeys(("text_config", "vision_config", "vision_feature_layer"))
    settings = {"data": {"evaluation": []}, "trainer": {"max_steps": 1}}
    folder = train(make_config(tmp_path, model={**weights, "pretrained": trained}, **settings))
    assert folder is not None
    assert (folder / "model/config.json").is_file()
    assert "has no processor" not in caplog.text


def test_weights_are_read_from_bin_files_if_there_are_no_others(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append(allow_patterns)
        return str(hub / "models--owner--language/snapshots" / REVISIONS["main"] / folders.pop(0))

    monkeypatch.setattr(pinned, "snapshot_download", download)
    section = config_of(language_model="owner/language@main", vision_encoder="owner/encoder@main").model
    folders = ["", "empty", "empty"]
    pinned.with_folders(section)
    assert asked == [list(pinned.FILES), list(pinned.FILES), ["pytorch_model*.bin"]]
