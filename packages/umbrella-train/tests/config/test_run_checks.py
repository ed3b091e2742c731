"""What a configuration is held against where a run is about to start, together with its other problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbrella_train.config import ConfigError, load_config


def problems_of(*overrides: str, to_run: bool = True) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, to_run=to_run)
    return caught.value.problems


def test_the_demo_has_no_problem() -> None:
    load_config(None, to_run=True)


def test_everything_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    nowhere = str(tmp_path / "nowhere")
    overrides = [
        *("--trainer.learning-rat", "1", "--trainer.world-size", "4", "--model.tokenizer", nowhere),
        *("--model.vision-config.model-type", "siglip_vison_model", "--model.text-config.num-attention-heads", "7"),
    ]
    unknown, vision, heads, tokenizer, world_size = problems_of(*overrides)
    assert unknown.startswith("trainer.learning_rat: no such key")
    assert vision.startswith("model.vision_config.model_type: transformers knows no siglip_vison_model; did you mean ")
    assert "siglip_vision_model" in vision
    assert heads.startswith("model.text_config.hidden_size: ")
    assert heads.endswith(" is not divisible by num_attention_heads, which is 7")
    assert tokenizer == f"model.tokenizer: there is no {nowhere}: neither a folder here nor a name on the hub"
    assert world_size.startswith("trainer.world_size is 4, but the number of processes launched is 2; ")


def test_a_name_on_the_hub_is_left_to_the_hub() -> None:
    load_config(None, ["--model.tokenizer", "maker/name"], to_run=True)


def test_a_value_that_transformers_refuses_names_its_section() -> None:
    (problem,) = problems_of("--model.text-config.hidden-size", '"wide"')
    assert problem.startswith("model.text_config: ")
    assert "hidden_size" in problem


def test_a_finished_run_is_read_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_config(None, ["--trainer.world-size", "4", "--model.tokenizer", "/moved/away"])


def test_positions_must_hold_the_longest_scan_after_pooling() -> None:
    positions = ("--model.text-config.max-position-embeddings", "63")
    grid = ("--model.modalities", '{"T1": {"image_size": [32, 32, 32], "patch_size": [8, 8, 8]}}')
    assert problems_of(*grid, *positions, to_run=False) == (
        "model.text_config.max_position_embeddings: 63 is less than the 64 tokens of one T1 scan",
    )
    load_config(None, [*grid, *positions, "--model.pool", '{"T1": [2, 1, 1]}'])
    load_config(None, [*grid, *positions, "--model.pool.T1", "2"])
