"""Weights and tokenizers that cannot be loaded: one message with the key, the source and what is expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from umbrella_model.tokens import image_token_id
from umbrella_train import cli
from umbrella_train.assembly import build
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer, load_tokenizer
from umbrella_train.assembly.load_errors import loading
from umbrella_train.assembly.predict import predict
from umbrella_train.config import RunConfig, dump_config
from umbrella_train.errors import RunError

MakeConfig = Callable[..., RunConfig]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = build_byte_tokenizer()
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=len(tokenizer)),
        image_token_index=image_token_id(tokenizer),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llava(whole_llava: Path, tmp_path: Path) -> Path:
    """A LLaVA with its tokenizer, to be damaged."""
    return Path(shutil.copytree(whole_llava, tmp_path / "llava"))


@pytest.fixture(scope="module")
def whole_run(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = make_config(folder.parent)
    components = build_components(config)
    components.model.save_pretrained(folder / "model")
    components.processor().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture
def run_folder(whole_run: Path, tmp_path: Path) -> Path:
    """A finished run with only a model, to be damaged."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Changes the tensors of a checkpoint, given the name of one of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors, next(name for name in tensors if name.endswith("projector.linear_1.weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder: Path, name: str = "model.safetensors") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder: truncate(folder, "config.json"), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "truncated": (truncate, "model.safetensors: "),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: "),
    "missing tensor": (
        lambda folder: edit_tensors(folder, lambda tensors, name: tensors.pop(name)),
        "missing in the checkpoint: model.multi_modal_projector.linear_1.weight",
    ),
    "unexpected tensor": (
        lambda folder: edit_tensors(folder, lambda tensors, name: tensors.update(bogus=torch.zeros(2))),
        "not in the model: bogus",
    ),
    "misshapen tensor": (
        lambda folder: edit_tensors(folder, lambda tensors, name: tensors.update({name: torch.zeros(3, 5)})),
        "linear_1.weight is (3, 5) in the checkpoint and (16, 16) in the model",
    ),
}
LLAVA_DAMAGES: dict[str, tuple[Damage, str]] = {
    **DAMAGES,
    "another model": (lambda folder: edit_config(folder, model_type="qwen2"), "'qwen2' checkpoint"),
    "an unknown model": (lambda folder: edit_config(folder, model_type="lava"), "lava"),
    "a field of the wrong type": (lambda folder: edit_config(folder, projector_hidden_act=3), "projector_hidden_act"),
}


def llava_config(make_config: MakeConfig, folder: Path, pretrained: str, **entries: object) -> RunConfig:
    random_weights = dict.fromkeys(("vision_config", "text_config", "vision_feature_layer"))
    return make_config(folder, model={**random_weights, "pretrained": pretrained, **entries})


@pytest.mark.parametrize("damage", LLAVA_DAMAGES)
def test_damaged_llava_is_rejected_with_key_and_folder(
    make_config: MakeConfig, llava: Path, tmp_path: Path, damage: str
) -> None:
    config = llava_config(make_config, tmp_path, str(llava))
    build_components(config)
    inflict, reason = LLAVA_DAMAGES[damage]
    inflict(llava)
    with pytest.raises(RunError) as caught:
        build_components(config)
    message = str(caught.value)
    assert message.startswith("model.pretrained: ")
    assert str(llava) in message.splitlines()[0]
    assert reason in message
    assert "It must be" in message.splitlines()[-1]


@pytest.mark.parametrize("key", ["pretrained", "tokenizer"])
def test_unknown_hub_name_is_one_message_of_the_command(
    make_config: MakeConfig,
    llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = {"pretrained": str(llava), key: "nobody/no-such-model"}
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(llava_config(make_config, tmp_path / "runs", **sources)))
    with pytest.raises(SystemExit) as caught:
        cli.train_command(["--config", str(path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"error: model.{key}: " in message
    assert "nobody/no-such-model" in message
    assert "hub repository" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["gone", "no JSON", "no tokenizer"])
def test_unreadable_tokenizer_is_rejected_with_its_key(tmp_path: Path, damage: str) -> None:
    build_byte_tokenizer().save_pretrained(tmp_path)
    if damage == "gone":
        (tmp_path / "tokenizer.json").unlink()
    else:
        (tmp_path / "tokenizer.json").write_text("{" if damage == "no JSON" else '{"version": "1.0"}')
    with pytest.raises(RunError, match=r"^model\.tokenizer: the tokenizer of ") as caught:
        load_tokenizer(str(tmp_path), key="model.tokenizer")
    assert str(tmp_path) in str(caught.value)
    assert "tokenizer.json" in str(caught.value).splitlines()[-1]


def test_llava_without_a_tokenizer_is_rejected(make_config: MakeConfig, llava: Path, tmp_path: Path) -> None:
    for path in llava.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RunError, match=r"^model\.pretrained: the tokenizer of .*llava"):
        build_components(llava_config(make_config, tmp_path, str(llava)))
    build_byte_tokenizer().save_pretrained(tmp_path / "words")
    build_components(llava_config(make_config, tmp_path, str(llava), tokenizer=str(tmp_path / "words")))


def test_source_in_the_home_folder_is_found(
    make_config: MakeConfig, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(llava.parent))
    config = llava_config(make_config, tmp_path, "~/llava", tokenizer="~/llava")
    assert config.model.pretrained == config.model.tokenizer == str(llava)
    build_components(config)


TRAINED_DAMAGES: dict[str, tuple[Damage, str]] = {
    **{name: DAMAGES[name] for name in DAMAGES if name != "no config"},
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "r of /"),
    "a truncated tokenizer": (lambda folder: truncate(folder, "tokenizer.json"), "r of /"),
}


@pytest.mark.parametrize("damage", TRAINED_DAMAGES)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_damaged_model_folder_is_one_message_of_the_command(
    run_folder: Path, capsys: pytest.CaptureFixture[str], damage: str, command: str
) -> None:
    inflict, reason = TRAINED_DAMAGES[damage]
    inflict(run_folder / "model")
    run, words = {
        "eval": (cli.eval_command, ["--max-samples", "1"]),
        "predict": (cli.predict_command, ["--question", "Which side?", "--use-cpu"]),
    }[command]
    with pytest.raises(SystemExit) as caught:
        run([str(run_folder), *words])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"{run_folder / 'model'}" in message
    assert reason in message
    assert "It must be the model/" in message


def test_truncated_processor_is_rejected(run_folder: Path) -> None:
    truncate(run_folder / "model", "processor_config.json")
    with pytest.raises(RunError, match=r"processor_config\.json"):
        predict(run_folder, question="Which side?", device="cpu")


def test_other_errors_keep_their_type(
    make_config: MakeConfig, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(build.UmbrellaForConditionalGeneration, "from_llava", fail)
    with pytest.raises(TypeError, match="a bug"):
        build_components(llava_config(make_config, tmp_path, str(llava)))


def test_run_error_is_unchanged() -> None:
    with pytest.raises(RunError, match=r"^no GPU$"), loading("weights", key="model", source="x", right="It must."):
        raise RunError("no GPU")
