"""Checks of a configuration before a run starts, reported together with its other problems."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from umbrella_model import monai_vit
from umbrella_train.config import ConfigError, load_config, run_checks
from umbrella_train.config.model import STATE_DICT_FILES


def problems_of(*overrides: str, to_run: bool = True) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, to_run=to_run)
    return caught.value.problems


def parts_of(**sources: object) -> tuple[str, ...]:
    """The problems of a model of given parts, in place of the demo's random weights."""
    kept = {"vision_encoder": "vision_config", "language_model": "text_config"}
    emptied = [f for key, config in kept.items() if key in sources for f in (f"--model.{config}", "null")]
    given = [f for key, value in sources.items() for f in (f"--model.{key.replace('_', '-')}", str(value))]
    return problems_of(*emptied, *given)


def test_missing_files_of_parts_are_reported_at_once() -> None:
    language, vision = parts_of(language_model="no.gguf", vision_encoder="no.pth", vision_num_heads=4)
    assert language.startswith("model.language_model: no.gguf ")
    assert vision.startswith("model.vision_encoder: no.pth ")


def test_attention_heads_belong_to_a_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "vit.pt").touch()
    (problem,) = parts_of(vision_encoder=tmp_path / "vit.pt")
    assert problem.startswith("model.vision_num_heads: is required")
    for options in ({"vision_encoder": tmp_path}, {}):
        (problem,) = parts_of(vision_num_heads=3, **options)
        assert problem.startswith("model.vision_num_heads: would not be used")
    for key in ("image", "patch"):
        (problem,) = problems_of(f"--model.vision-{key}-size", "8", "8", "16")
        assert problem.startswith(f"model.vision_{key}_size: would not be used")


def test_endings_of_weights_are_those_of_umbrella_model() -> None:
    assert STATE_DICT_FILES == monai_vit.STATE_DICT_FILES


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("gpt2@refs/pr/1", "gpt2", "refs/pr/1"),
        ("owner/name@", "owner/name@", None),
        ("", "", None),
        ("/data/you@host/llama", "/data/you@host/llama", None),
        ("./llama@2", "./llama@2", None),
        ("a/b/c@2", "a/b/c@2", None),
        ("words@q4.gguf", "words@q4.gguf", None),
        ("owner/encoder@best.pt", "owner/encoder@best.pt", None),
        ("folder@2", "folder@2", None),
        ("folder/llama@2", "folder/llama@2", None),
    ],
)
def test_a_revision_follows_a_name_on_the_hub(
    source: str, name: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder@2", "folder/llama@2"):
        Path(folder).mkdir(parents=True)
    assert run_checks.split_revision(source) == (name, revision)


def test_a_revision_with_slashes_is_no_path() -> None:
    assert parts_of(language_model="owner/name@refs/pr/1", vision_encoder="./nowhere@main") == (
        "model.vision_encoder: ./nowhere@main is neither an existing folder or file nor a name on the hub",
    )


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


def test_own_vision_encoder_is_a_model_type() -> None:
    own = {"model_type": "umbrella_vision_encoder", "encoder": "mixer", "options": {"depth": 2}}
    assert run_checks.run_problems({"model": {"vision_config": own}}) == []
    (problem,) = run_checks.run_problems({"model": {"vision_config": own | {"option": {}}}})
    assert problem.startswith("model.vision_config.option: ")


def test_misspelt_key_of_a_hugging_face_config_is_reported() -> None:
    # rope_theta is of older config.json files; transformers still reads it.
    layers, size = problems_of(
        *("--model.text-config.num-hidden-layer", "3", "--model.text-config.rope-theta", "5000"),
        *("--model.vision-config.hidden-sise", "3"),
    )[::-1]
    assert layers == "model.text_config.num_hidden_layer: no such key of qwen2; did you mean 'num_hidden_layers'?"
    assert size == "model.vision_config.hidden_sise: no such key of siglip_vision_model; did you mean 'hidden_size'?"


def test_true_and_false_in_a_file_are_not_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {learning_rate: yes, eval_steps: off, max_steps: true, use_cpu: true}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    found = {text.partition(":")[0] for text in caught.value.problems if "must be a number (it is " in text}
    assert found == {"trainer.learning_rate", "trainer.eval_steps", "trainer.max_steps"}


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


def test_trackers_that_are_not_installed_are_reported_with_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "find_spec", lambda module: None)
    for name in ("mlflow", "trackio", "wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = ("--trainer.report-to", "[wandb, mlflow, tensorboard, trackio, 3, [x]]", "--trainer.world-size", "4")
    problems = [problem for problem in problems_of(*options) if "pip install" in problem]
    assert [problem.partition(" needs ")[0] for problem in problems] == [
        f"trainer.report_to: {name}" for name in ("mlflow", "tensorboard", "trackio", "wandb")
    ]
    assert "mlflow and sqlalchemy and alembic" in problems[0]
    assert "umbrella-train[mlflow]" in problems[0]
    assert len(problems_of(*options)) > len(problems)


def test_a_server_of_mlflow_needs_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "find_spec", lambda module: None if module == "sqlalchemy" else find_spec(module))
    monkeypatch.delitem(sys.modules, "sqlalchemy", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    load_config(None, ["--trainer.report-to", "mlflow"], to_run=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (problem,) = problems_of("--trainer.report-to", "mlflow")
    assert "mlflow needs sqlalchemy" in problem
