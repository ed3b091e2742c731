"""A run that starts from the model of an earlier one."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from umbrella_model import parameter_table
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.training import train

MakeConfig = Callable[..., RunConfig]
# A trained model has its own.
GIVEN = dict.fromkeys(("vision_config", "text_config", "vision_feature_layer"))


@pytest.fixture(scope="module")
def first(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a first stage, with adapters in the language model."""
    pytest.importorskip("peft")
    config = make_config(
        tmp_path_factory.mktemp("first"),
        model={"learn": {"preset": "lora", "lora": {"rank": 2, "alpha": 4}}},
        data={"evaluation": []},
        trainer={"max_steps": 2, "learning_rate": 0.05, "use_cpu": True},
    )
    folder = train(config)
    assert folder is not None
    return folder / "model"


def second_stage(make_config: MakeConfig, folder: Path, first: Path, **model: Any) -> RunConfig:
    return make_config(
        folder,
        model={**GIVEN, "pretrained": str(first), **model},
        data={"evaluation": []},
        # The first step of a warm-up has a learning rate of 0.
        trainer={"max_steps": 1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "use_cpu": True},
    )


def test_second_stage_merges_the_adapters_of_the_first_and_trains_everything(
    make_config: MakeConfig, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(second_stage(make_config, tmp_path, first))
    assert folder is not None
    before, after = load_file(first / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    assert not any(".lora_" in name for name in after)
    kept = [name for name in after if name in before]
    assert len(kept) > 10
    assert all(torch.equal(before[name], after[name]) for name in kept)
    merged = next(name for name in before if name.endswith("q_proj.base_layer.weight"))
    a, b = (before[merged.replace("base_layer", f"lora_{each}.default")] for each in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(after[merged.replace("base_layer.", "")], before[merged] + 4 / 2 * b @ a)
    assert "was trained" not in caplog.text
    model = build_components(second_stage(make_config, tmp_path, first)).model
    assert all(row.num_trainable == row.num_parameters for row in parameter_table(model))


def test_equal_adapters_are_kept(make_config: MakeConfig, first: Path, tmp_path: Path) -> None:
    learn = {"preset": "lora", "lora": {"rank": 2, "alpha": 4}}
    model = build_components(second_stage(make_config, tmp_path, first, learn=learn)).model
    before = load_file(first / "model.safetensors")
    adapters = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    assert adapters
    assert all(torch.equal(value, before[name]) for name, value in adapters.items())
    other = build_components(second_stage(make_config, tmp_path, first, learn={"preset": "lora"})).model
    assert other.config.lora is not None
    assert other.config.lora["rank"] == 16


def test_pretrained_model_of_other_sizes_is_rejected_with_every_difference(
    make_config: MakeConfig, first: Path, tmp_path: Path
) -> None:
    sizes = {
        "T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 4]},
        "rsfMRI": {"image_size": [8, 8, 8, 8], "patch_size": [8, 8, 4, 4]},
    }
    config = second_stage(
        make_config, tmp_path, first, modalities=sizes, pool={"rsfMRI": [1, 1, 2, 1]}, vision_feature_layer=-2
    )
    with pytest.raises(RunError) as caught:
        build_components(config)
    head, *differences = str(caught.value).splitlines()
    assert str(first) in head
    expected = [
        ("modalities", "rsfMRI, T1, dMRI", "T1, rsfMRI"),
        ("T1: patch_size", "[8, 8, 8]", "[8, 8, 4]"),
        ("rsfMRI: pool", "[1, 1, 1, 1]", "[1, 1, 2, 1]"),
        ("vision_feature_layer", "-1", "-2"),
    ]
    assert len(differences) == len(expected)
    assert all(word in line for words, line in zip(expected, differences, strict=True) for word in words)


def test_a_layer_without_the_final_norm_is_not_that_of_a_composed_model(
    make_config: MakeConfig, first: Path, tmp_path: Path
) -> None:
    """The last layer, -1, is before the final norm, after which the features of a composed model are."""
    build_components(second_stage(make_config, tmp_path, first, vision_feature_layer=-1))
    trained = tmp_path / "trained"
    shutil.copytree(first, trained)
    content = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(content | {"vision_final_norm": True}))
    with pytest.raises(RunError, match=r"vision_feature_layer is not set .*final norm.* and -1 in the config"):
        build_components(second_stage(make_config, tmp_path, trained, vision_feature_layer=-1))


def test_code_in_the_folder_of_a_trained_model_is_not_asked_about(
    make_config: MakeConfig, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer is also loaded with its preprocessing."""
    trained = tmp_path / "trained"
    shutil.copytree(first, trained)
    build_byte_tokenizer().save_pretrained(tmp_path / "words")
    entries = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["theirs.Words", None]}}
    (trained / "tokenizer_config.json").write_text(json.dumps(entries))
    (trained / "theirs.py").write_text("class Words: ...")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    train(second_stage(make_config, tmp_path, trained, tokenizer=str(tmp_path / "words")))
    assert asked == []


def test_new_modality_is_added_after_those_of_the_model(
    make_config: MakeConfig, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    grid = {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}
    small = make_config(tmp_path / "small", model={"modalities": {"T1": grid}})
    build_components(small).model.save_pretrained(tmp_path / "trained")
    build_components(small).processor().save_pretrained(tmp_path / "trained")
    sizes = {"T1": grid, "dMRI": {"image_size": [8, 8, 8], "patch_size": [8, 8, 2]}}
    config = second_stage(make_config, tmp_path, tmp_path / "trained", modalities=sizes)
    model = build_components(config).model
    assert "new in this run, from random weights: dMRI" in caplog.text
    assert model.config.modality_order == ["T1", "dMRI"]
    before, after = load_file(tmp_path / "trained" / "model.safetensors"), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[2] for name in after.keys() - before.keys() if "head" not in name} == {"dMRI_patch_embed"}
    again = build_components(config).model.state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    edited = dict(before)
    del edited["model.multi_modal_projector.linear_1.weight"]
    save_file(edited, tmp_path / "trained" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model\.multi_modal_projector\.linear_1\.weight"):
        build_components(config)


def test_tokenizer_with_other_ids_is_rejected(make_config: MakeConfig, first: Path, tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(RunError, match=r"^model\.tokenizer: its id of '<other>' differs"):
        build_components(second_stage(make_config, tmp_path, first, tokenizer=str(tmp_path / "words")))


@pytest.mark.isolated
def test_adapters_without_peft_are_rejected_with_the_config_key(
    make_config: MakeConfig, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"^model\.pretrained: .*pip install peft"):
        build_components(second_stage(make_config, tmp_path, first))
    with pytest.raises(RunError, match=r"^model\.learn: .*pip install peft"):
        build_components(make_config(tmp_path, model={"learn": {"preset": "lora"}}))


def test_changed_preprocessing_and_a_missing_cache_are_warned_of(
    make_config: MakeConfig, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = second_stage(make_config, tmp_path, first)
    data = config.data.model_dump(mode="json") | {"pipelines": {"T1": {"normalise": "zscore"}}, "cache_dir": None}
    config = RunConfig.model_validate({**config.model_dump(mode="json"), "data": data})
    assert train(config, dry_run=True) is None
    assert re.search(r"data\.pipelines\.T1: .*normalise zscore .*foreground_zscore", caplog.text)
    assert "data.pipelines.rsfMRI" not in caplog.text
    # The rows with dMRI are among those that it trains on.
    assert [config.data.train[0].manifest] == [
        each.args[0] for each in caplog.records if each.name == "umbrella_train.assembly.sources"
    ]
