"""The model of a config: its source, feature layer, tokens and trainable parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import ViT
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from umbrella_data.chat import template
from umbrella_model import parameter_table, tokens, trainable
from umbrella_model.tokens import image_token_id
from umbrella_train import DummyLoss
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.config import ConfigError, RunConfig, load_config
from umbrella_train.config.model import LearnConfig
from umbrella_train.errors import RunError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
MODALITIES = {
    "rsfMRI": {"image_size": [8, 8, 8, 8], "patch_size": [4, 4, 4, 4]},
    "T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]},
}


def test_chatml_is_the_same_for_encoding_and_for_composed_models() -> None:
    assert tokens.CHATML_TEMPLATE == template.CHATML_TEMPLATE


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A checkpoint whose features are from the second last layer, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_byte_tokenizer()
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIZES, image_size=16, patch_size=4),
        text_config=Qwen2Config(**SIZES, num_key_value_heads=1, vocab_size=len(tokenizer)),
        image_token_index=image_token_id(tokenizer),
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def pretrained_config(llava: Path, **entries: Any) -> RunConfig:
    model = {"pretrained": str(llava), "modalities": MODALITIES, **entries}
    return RunConfig.model_validate({"model": model, "data": {"synthetic": {}}})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_is_trained_in_float32(llava: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype).save_pretrained(llava)
    components = build_components(pretrained_config(llava))
    model = components.model.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.randint(1, 50, (2, 8))
    out = model(input_ids=ids, labels=ids)
    (out.loss + DummyLoss(scale=1e-7)(out.dummy_terms)).backward()
    for name in MODALITIES:
        parameters = model.model.vision_tower.patch_embed(name).parameters()
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        assert norm.item() == pytest.approx(1e-7, rel=1e-3)
    model.to(dtype).save_pretrained(tmp_path / "model")
    components.tokenizer.save_pretrained(tmp_path / "model")
    again = build_components(pretrained_config(llava), weights=tmp_path / "model").model
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_dtype_in_the_config_of_a_part_does_not_change_the_training_dtype() -> None:
    vision = {"model_type": "siglip_vision_model", **SIZES, "dtype": "bfloat16"}
    text = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1, "dtype": "float16"}
    section = {"vision_config": vision, "text_config": text, "modalities": MODALITIES}
    model = build_components(RunConfig.model_validate({"model": section, "data": {"synthetic": {}}})).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("entries", "depth"), [({}, 2), ({"vision_feature_layer": -1}, 3)])
def test_feature_layer_is_that_of_the_config_or_of_the_checkpoint(
    llava: Path, entries: dict[str, Any], depth: int
) -> None:
    model = build_components(pretrained_config(llava, **entries)).model
    assert len(model.model.vision_tower.encoder.encoder.layers) == depth


def test_random_weights_keep_every_layer_by_default() -> None:
    text = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1}
    model = {"vision_config": {"model_type": "siglip_vision_model", **SIZES}, "text_config": text}
    for entries, depth in (({}, 3), ({"vision_feature_layer": -2}, 2)):
        section = {**model, "modalities": MODALITIES, **entries}
        components = build_components(RunConfig.model_validate({"model": section, "data": {"synthetic": {}}}))
        assert len(components.model.model.vision_tower.encoder.encoder.layers) == depth


def test_init_selects_the_initial_patch_embeds(llava: Path) -> None:
    def weight(**entries: Any) -> torch.Tensor:
        tower = build_components(pretrained_config(llava, **entries)).model.model.vision_tower
        return tower.patch_embed("T1").proj.weight

    assert torch.equal(weight(), weight(init="inflate"))
    # Random filters have unit gain; inflated ones divide one grey filter over the depth.
    assert weight(init="random").std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert not torch.allclose(weight(), weight(init="random"))


def test_pool_reduces_the_number_of_tokens(llava: Path) -> None:
    components = build_components(pretrained_config(llava, pool={"bold": [2, 1, 1, 2], "T1": 2}))
    assert {name: components.model.num_image_tokens(name) for name in components.pipelines} == {"rsfMRI": 4, "T1": 1}


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"T1": 4}, "model.pool.T1: "),
        ({"rsfMRI": [2, 2, 2]}, "model.pool.rsfMRI: "),
        ({"dMRI": 2}, r"model.pool.dMRI: "),
    ],
)
def test_pool_that_does_not_divide_the_grid_is_rejected(tmp_path: Path, pool: dict[str, Any], message: str) -> None:
    import yaml

    content = {"model": {"pretrained": "llava", "modalities": MODALITIES, "pool": pool}, "data": {"synthetic": {}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.yaml")


def test_pool_can_be_overridden(tmp_path: Path) -> None:
    import yaml

    content = {"model": {"pretrained": "llava", "modalities": MODALITIES, "pool": {"T1": 1}}, "data": {"synthetic": {}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config = load_config(tmp_path / "config.yaml", ["--model.pool.T1", "2"])
    assert config.model.pool == {"T1": 2}


def test_presets_of_config_and_model_are_equal() -> None:
    for name, modes in trainable.PRESETS.items():
        assert LearnConfig.model_validate({"preset": name}).parts == modes


@pytest.mark.parametrize(
    ("learn", "part", "share"),
    [({"preset": "lora"}, "language_model", 0.5), ({"preset": "align", "projector": "frozen"}, "projector", 0.0)],
)
def test_trainable_parts_of_the_config_are_applied(llava: Path, learn: dict[str, Any], part: str, share: float) -> None:
    pytest.importorskip("peft")
    model = build_components(pretrained_config(llava, learn={**learn, "lora": {"rank": 2}})).model
    row = next(row for row in parameter_table(model) if row.part == part)
    assert 0 < row.num_trainable < share * row.num_parameters if share else row.num_trainable == 0


def test_learning_rate_of_a_frozen_part_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"learning_rates\.vision_tower"):
        LearnConfig.model_validate({"preset": "align", "learning_rates": {"vision_tower": 1e-4}})


def test_a_file_with_an_oblong_monai_vit_is_used_by_configuration(tmp_path: Path) -> None:
    size, patch = (16, 8, 24), (8, 4, 6)
    monai = ViT(1, size, patch, hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, proj_type="perceptron")
    torch.save(monai.state_dict(), tmp_path / "vit.pt")
    entries = {
        "vision_encoder": str(tmp_path / "vit.pt"),
        "vision_num_heads": 2,
        "text_config": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1},
        "modalities": {"T1": {"image_size": size, "patch_size": patch}},
    }
    sizes = {"vision_image_size": size, "vision_patch_size": patch}

    def build(**sizes: Any) -> torch.nn.Module:
        config = RunConfig.model_validate({"model": {**entries, **sizes}, "data": {"synthetic": {}}})
        return build_components(config).model.eval()

    model = build(**sizes)
    scans = torch.randn(2, 1, *size)
    with torch.no_grad():
        features = model.model.vision_tower({"T1": scans}).features["T1"]
        torch.testing.assert_close(features, monai.eval()(scans)[0])
    for missing in sizes:
        with pytest.raises(RunError, match=f"model.{missing}"):
            build(**{key: value for key, value in sizes.items() if key != missing})
