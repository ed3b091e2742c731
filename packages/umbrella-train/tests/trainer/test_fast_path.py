"""What a run's batches and model ask of a GPU: logits where there is loss alone, and no answer that is waited for."""

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


def test_a_training_step_of_a_run_never_asks_the_device(make_config: MakeConfig, tmp_path: Path) -> None:
    """On the meta device a tensor has no value: whatever reads one fails, as it would make the host wait on a GPU."""
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


def test_the_positions_with_loss_are_those_of_the_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    components = build_components(config)
    collator = pickle.loads(pickle.dumps(components.collator()))  # as a loader's worker gets it
    dataset = components.dataset(config.data.train[0], config=config, augment=False)
    batch = collator([dataset[0], dataset[7]])
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    assert batch["supervised_index"].tolist() == (rows * batch["labels"].shape[1] + columns - 1).tolist()
    assert "supervised_index" not in components.collator(padding_side="left")([dataset.prompt(0)])


@pytest.mark.parametrize("is_training", [True, False])
def test_loss_and_gradients_are_those_of_sdpa_at_all_positions(
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


def test_the_default_is_varlen_and_the_config_decides(make_config: MakeConfig, tmp_path: Path) -> None:
    for wanted, expected in ((None, "varlen"), ("sdpa", "sdpa"), ("eager", "eager")):
        model = build_components(make_config(tmp_path, model={"attn_implementation": wanted})).model
        assert model.model.language_model.config._attn_implementation == expected
    # What is saved is the model, not how it was computed.
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
def test_a_language_model_with_a_sliding_window_keeps_its_mask(
    make_model: Callable[..., Any], text_config: Any
) -> None:
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


def test_attention_that_was_chosen_elsewhere_is_left(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    set_attention(model, None)
    assert model.model.language_model.config._attn_implementation == "eager"
