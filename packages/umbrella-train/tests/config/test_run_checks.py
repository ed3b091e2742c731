"""Checks of a configuration before a run starts, reported together with its other problems."""

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


def test_all_problems_are_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    nowhere = str(tmp_path / "nowhere")
    overrides = [
        *("--trainer.learning-rat", "1", "--trainer.world-size", "4", "--model.tokenizer", nowhere),
        *("--model.vision-config.model-type", "siglip_vison_model", "--model.text-config.num-attention-heads", "7"),
    ]
    unknown, vision, heads, tokenizer, world_size = problems_of(*overrides)
    assert unknown.startswith("trainer.learning_rat: ")
    assert vision.startswith("model.vision_config.model_type: ")
    assert "'siglip_vision_model'" in vision
    assert heads.startswith("model.text_config.hidden_size: ")
    assert heads.endswith(" num_attention_heads, which is 7")
    assert tokenizer.startswith(f"model.tokenizer: {nowhere} ")
    assert world_size.startswith("trainer.world_size is 4, ")


def test_names_on_the_hub_are_not_checked() -> None:
    load_config(None, ["--model.tokenizer", "maker/name"], to_run=True)


def test_a_value_that_transformers_rejects_is_reported_with_its_section() -> None:
    (problem,) = problems_of("--model.text-config.hidden-size", '"wide"')
    assert problem.startswith("model.text_config: ")
    assert "hidden_size" in problem


def test_a_finished_run_can_be_read_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_config(None, ["--trainer.world-size", "4", "--model.tokenizer", "/moved/away"])


def test_positions_must_suffice_for_a_scan_after_pooling() -> None:
    positions = ("--model.text-config.max-position-embeddings", "63")
    grid = ("--model.modalities", '{"T1": {"image_size": [32, 32, 32], "patch_size": [8, 8, 8]}}')
    (problem,) = problems_of(*grid, *positions, to_run=False)
    assert problem.startswith("model.text_config.max_position_embeddings: 63 is less than the 64 tokens")
    load_config(None, [*grid, *positions, "--model.pool", '{"T1": [2, 1, 1]}'])
    load_config(None, [*grid, *positions, "--model.pool.T1", "2"])
