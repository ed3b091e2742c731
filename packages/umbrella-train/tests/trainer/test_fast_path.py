"""Logits only at positions with loss, and no device synchronisation in a training step."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, Qwen2Config

from umbrella_model import UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train.assembly.acceleration import set_attention
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError

MakeConfig = Callable[..., RunConfig]


def training_batch(components: TrainingComponents, config: RunConfig) -> dict[str, Any]:
    return components.collator()(list(components.mixture(config.data.train, config=config, augment=False)))


def without_dropout(components: TrainingComponents) -> UmbrellaForConditionalGeneration:
    for layer in components.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.0
    return components.model.train()


def test_training_step_does_not_synchronise_with_the_device(make_config: MakeConfig, tmp_path: Path) -> None:
    """On the meta device tensors have no values: code that would make the host wait for a GPU fails."""
    config = make_config(tmp_path)
    components = build_components(config)
    batch = training_batch(components, config)
    num_supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert num_supervised < batch["labels"].numel()
    model = components.model.train().to("meta")
    volumes = {name: volume.to("meta") for name, volume in batch.pop("pixel_values").items()}
    for present in (volumes, {"T1": volumes["T1"]}, {}):
        out = model(**{key: value.to("meta") for key, value in batch.items()}, pixel_values=present)
        assert out.logits is None
        assert out.supervised_logits.shape == (num_supervised, len(components.tokenizer))
        out.loss.backward()


def test_supervised_positions_are_those_of_the_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    collator = pickle.loads(pickle.dumps(components.collator()))  # as in a loader worker
    dataset = components.dataset(config.data.train[0], config=config, augment=False)
    batch = collator([dataset[0], dataset[7]])
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    assert batch["supervised_index"].tolist() == (rows * batch["labels"].shape[1] + columns - 1).tolist()
    assert "supervised_index" not in components.collator(padding_side="left")([dataset.prompt(0)])


@pytest.mark.parametrize("is_training", [True, False])
def test_loss_and_gradients_equal_sdpa_with_all_logits(
    make_config: MakeConfig, tmp_path: Path, is_training: bool
) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    batch = training_batch(components, config)
    assert not batch["attention_mask"].bool().all()
    plain = build_components(make_config(tmp_path, model={"attn_implementation": "sdpa"}))
    all_positions = {key: value for key, value in batch.items() if key != "supervised_index"}
    found: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for each, inputs in ((components, batch), (plain, all_positions)):
        model = without_dropout(each).train(is_training)
        loss = model(**inputs).loss
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_attention_is_varlen_unless_the_config_names_another(make_config: MakeConfig, tmp_path: Path) -> None:
    for wanted, expected in ((None, "varlen"), ("sdpa", "sdpa"), ("eager", "eager")):
        model = build_components(make_config(tmp_path, model={"attn_implementation": wanted})).model
        assert model.model.language_model.config._attn_implementation == expected
    # The attention implementation is not saved with the model.
    model.save_pretrained(tmp_path / "model")
    loaded = UmbrellaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == "sdpa"


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES_LESS = [
    MistralConfig(**SIZES, num_key_value_heads=1, vocab_size=64, sliding_window=8),
    Qwen2Config(
        **SIZES, num_key_value_heads=1, vocab_size=64, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
]


@pytest.mark.parametrize("text_config", SEES_LESS, ids=lambda config: config.model_type)
def test_sliding_window_keeps_sdpa(make_model: Callable[..., Any], text_config: Any) -> None:
    entries = make_model().config
    config = UmbrellaConfig(
        modalities=entries.patch_embeds,
        vision_config=entries.vision_config,
        text_config=text_config,
        image_token_index=entries.image_token_id,
    )
    model = UmbrellaForConditionalGeneration(config)
    set_attention(model, None)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(RunError, match=r"model\.attn_implementation.*sliding window"):
        set_attention(model, "varlen")


def test_attention_other_than_sdpa_is_kept(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    set_attention(model, None)
    assert model.model.language_model.config._attn_implementation == "eager"
