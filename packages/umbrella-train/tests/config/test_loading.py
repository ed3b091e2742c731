"""The configuration: schema, strict YAML, overrides, and every problem at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from umbrella_train.config import (
    AugmentSettings,
    ConfigError,
    PipelineSettings,
    RunConfig,
    TrainerConfig,
    demo_config_path,
    dump_config,
    load_config,
)
from umbrella_train.config.strict_yaml import looks_secret

GOOD = """
name: small
model:
  vision_config: {model_type: siglip_vision_model, hidden_size: 8}
  text_config: {model_type: qwen2, hidden_size: 8, pad_token_id: 0}
  modalities:
    rsfMRI: {image_size: [8, 8, 8, 4], patch_size: [4, 4, 4, 2]}
    T1w: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}
data:
  synthetic: {num_train: 3}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def problems_of(path: Path | None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_modalities_keep_their_order_and_get_canonical_names(good: Path) -> None:
    config = load_config(good)
    assert list(config.model.modalities) == ["rsfMRI", "T1"]
    assert config.model.modalities["rsfMRI"].grid_size == (2, 2, 2, 2)
    assert config.model.modalities["rsfMRI"].num_patches == 16


def test_config_is_equal_after_dump_and_load(tmp_path: Path) -> None:
    config = load_config(None, ["--trainer.learning-rate", "1e-5", "--data.pipelines.T1.spacing", "2", "2", "2.5"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_the_folder_of_runs_is_absolute(good: Path) -> None:
    assert load_config(good).output_dir == Path.cwd() / "runs"
    assert load_config(good, ["--output-dir", "mine"]).output_dir == Path.cwd() / "mine"


def test_config_is_frozen(good: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(good).name = "other"  # type: ignore[misc]


def test_all_problems_come_at_once_with_dotted_paths(tmp_path: Path) -> None:
    text = """
model:
  vision_config: {model_type: clip_vision_model}
  text_config: {hidden_size: 8}
  modalities:
    T1: {image_size: [128, 128, 128], patch_size: [18, 16, 16]}
data:
  synthetic: {num_train: none}
trainer:
  learning_rat: 1e-5
  max_steps: -3
  bf16: true
  fp16: true
dummy_los: {scale: 1}
"""
    problems = problems_of(write(tmp_path, text), "--trainer.learning-rate", "fast")
    expected = (
        "model.modalities.T1.image_size: 128 along X is not divisible by the patch of 18: 126 or 144",
        "data.synthetic.num_train: ",
        "trainer.learning_rat: no such key; did you mean trainer.learning_rate?",
        "trainer.learning_rate: ",
        "dummy_los: no such key; did you mean dummy_loss?",
        "trainer.max_steps: -3 is neither a number of steps nor -1",
        "trainer.fp16: cannot be combined with bf16: choose one",
    )
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start
    assert len(problems) == len(expected)


def test_a_section_is_checked_as_a_whole_in_spite_of_unknown_keys(good: Path) -> None:
    problems = problems_of(good, "--trainer.bogus", "1", "--trainer.bf16", "--trainer.fp16")
    assert [problem.split(":")[0] for problem in problems] == ["trainer.bogus", "trainer.fp16"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [
                *("--model.modalities.rsfMRI.image-size", "8", "8", "8", "--data.mixing", "temperature"),
                *("--model.modalities.rsfMRI.patch-size", "4", "4", "4", "--trainer.bf16", "--trainer.fp16"),
                *("--data.pipelines.dMRI", "{}"),
            ],
            [
                "model.modalities.rsfMRI.image_size: has 3",
                "data.temperature: is None with",
                "trainer.fp16: cannot",
                "data.pipelines.dMRI: model.modalities has no dMRI (it has rsfMRI, T1)",
            ],
        ),
        # A wrong value hides nothing that others have to do with each other ...
        (
            ["--data.max-length", "x", "--data.temperature", "2", "--data.max-bad-fraction", "0.5"],
            ["data.max_length: ", "data.temperature: is 2.0", "data.max_bad_fraction: would not be used"],
        ),
        (
            ["--trainer.seed", "1", "--trainer.optim", "x", "--trainer.max-steps", "0"],
            ["trainer.seed: no such key", "trainer.optim: ", "trainer.max_steps: 0 is"],
        ),
        (
            ["--trainer.logging-steps", "0", "--trainer.fp16", "--trainer.engine", "fsdp2", "--trainer.use-cpu"],
            ["trainer.logging_steps: ", "trainer.fp16: cannot be combined with engine fsdp2", "trainer.fp16: needs"],
        ),
        (
            ["--data.synthetic.seed", "-1", "--data.evaluation.0.manifest", "m.jsonl"],
            ["data.synthetic.seed: ", "data.evaluation: cannot stand beside synthetic"],
        ),
        (
            ["--data.pipelines.T1.spacing", "x", "1", "1", "--data.pipelines.T3", "{}"],
            ["data.pipelines.T1.spacing.0: ", "data.pipelines.T3: unknown modality"],
        ),
        (
            ["--data.pipelines.dMRI.spacing", "x", "1", "1", "--seed", "-1"],
            ["data.pipelines.dMRI.spacing.0: ", "data.pipelines.dMRI: model.modalities has no", "seed: "],
        ),
        # ... and what takes its place does not make a problem of its own.
        (["--data.mixing", "temprature", "--data.temperature", "2"], ["data.mixing: "]),
        (["--data.mixing", "temperature", "--data.temperature", "-1"], ["data.temperature: "]),
        (["--data.on-bad-scan", "jump", "--data.max-bad-fraction", "0.5"], ["data.on_bad_scan: "]),
        (["--data.synthetic", "3"], ["data.synthetic: "]),
        (["--data.synthetic", "null", "--data.train.0.weight", "2"], ["data.train.0.manifest: is missing"]),
        (
            [
                *("--data.synthetic", "null", "--data.mixing", "equal", "--data.train.0.manifest", "a.jsonl"),
                *("--data.train.0.weight", "2", "--data.train.1.manifest", "b.jsonl", "--data.train.1.weight", "-1"),
            ],
            ["data.train.0.weight: would not be used: mixing is equal", "data.train.1.weight: "],
        ),
        (["--model.modalities.T1.image-size", "8", "8", "x"], ["model.modalities.T1w.image_size.2: "]),
        (
            ["--model.modalities.T1.image-size", "8", "x", "8", "--model.pool.T1", "2", "--data.pipelines.T1", "{}"],
            ["model.modalities.T1w.image_size.1: "],
        ),
        (
            [
                *("--model.modalities", '{"T1": {"image_size": [8, 8, 8]}}'),
                *("--model.text-config.max-position-embeddings", "4"),
            ],
            ["model.modalities.T1.patch_size: is missing"],
        ),
        (["--model.learn.preset", "x", "--model.learn.learning-rates.vision-tower", "1"], ["model.learn.preset: "]),
        (
            ["--model.learn.preset", "align", "--model.learn.learning-rates.vision-tower", "1", "--data.packing", "3"],
            ["model.learn.learning_rates.vision_tower: would not be used", "data.packing: "],
        ),
        (["--model", "3", "--data.temperature", "2"], ["model: ", "data.temperature: is 2.0"]),
    ],
)
def test_every_problem_comes_at_once_and_none_that_is_not_there(
    good: Path, overrides: list[str], expected: list[str]
) -> None:
    problems = problems_of(good, *overrides)
    assert len(problems) == len(expected), problems
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)


def test_a_value_is_shown_and_a_long_one_cut_short(good: Path) -> None:
    (problem,) = problems_of(good, "--seed", "x" * 1000)
    assert re.search(r"\(it is 'x+\.\.\.x+'\)$", problem)
    assert len(problem) < 200


def test_a_key_in_the_wrong_section_is_shown_its_place(good: Path) -> None:
    (problem,) = problems_of(good, "--learning-rate", "1e-3")
    assert problem.endswith("did you mean trainer.learning_rate?")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (
            ["--model.modalities.T2", '{"image_size": [8, 8, 8], "patch_size": [4, 4, 4]}'],
            "model.modalities.T2: unknown",
        ),
        (["--model.modalities.T1.image-size", "8", "8", "8", "8"], "model.modalities.T1w.patch_size: has 3 numbers"),
        (
            ["--model.modalities.dwi", '{"image_size": [8, 8, 8, 4], "patch_size": [4, 4, 4, 4]}'],
            "model.modalities.dMRI.image_size: has 4 numbers where dMRI has 3 axes (X, Y, Z)",
        ),
        (["--model.pretrained", "some/llava"], "model.vision_config: would not be used"),
        (["--model.vision-config", "null"], "model.vision_config: is needed"),
        (["--model.text-config", "{}"], "model.text_config.model_type: is missing"),
        (["--data.synthetic", "null"], "data: names nothing to train on"),
        (["--data.train", '[{"manifest": "m.jsonl"}]'], "data.train: cannot stand beside synthetic"),
        (["--data.pipelines.dMRI.spacing", "2", "2", "2"], "data.pipelines.dMRI: model.modalities has no dMRI"),
        (["--trainer.fp16", "--trainer.use-cpu"], "trainer.fp16: needs a GPU"),
        (["--name", "../up"], "name: "),
        (["--trainer.report-to", "tensorboard"], "trainer.report_to.0: "),
        (["--trainer.learning-rate", "1", "2"], "--trainer.learning-rate: takes one value, 2 given (1 2)"),
        (["--trainer.learning-rate"], "--trainer.learning-rate: takes one value, 0 given"),
        (["--data.train.3.manifest", "x"], "--data.train.3.manifest: there is no entry 3"),
        (["--name.first", "x"], "--name.first: name holds 'small'"),
        (["stray"], "stray: does not follow a --key"),
    ],
)
def test_mistakes_are_named(good: Path, overrides: list[str], start: str) -> None:
    problems = problems_of(good, *overrides)
    assert any(problem.startswith(start) for problem in problems), problems


def test_two_names_of_one_modality_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("data:", "    sMRI: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}\ndata:")
    assert problems_of(write(tmp_path, text)) == (
        "model.modalities.sMRI: is another name of T1, which is here already",
    )


def test_overrides_reach_every_kind_of_key(good: Path) -> None:
    config = load_config(
        good,
        [
            *("--model.modalities.T1.patch-size", "8", "8", "8"),  # the file calls it T1w
            *("--model.vision-config.hidden-size", "16", "--model.vision-config.attention-dropout=0.5"),
            *("--trainer.learning-rate", "1e-4", "--trainer.max-steps", "-1", "--trainer.bf16"),
            *("--data.train.0.manifest", "a.jsonl", "--data.train.1.manifest", "b.jsonl", "--data.synthetic", "null"),
            *("--trainer.report-to", "wandb", "--report.no-controls", "--model.learn.preset", "align"),
            *("--model.learn.embeddings", "train", "--trainer.save-total-limit", "none", "--name", "0012"),
        ],
    )
    assert config.model.modalities["T1"].patch_size == (8, 8, 8)
    assert config.model.vision_config == {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "attention_dropout": 0.5,
    }
    assert (config.trainer.learning_rate, config.trainer.max_steps, config.trainer.bf16) == (1e-4, -1, True)
    assert [dataset.manifest for dataset in config.data.train] == [Path.cwd() / "a.jsonl", Path.cwd() / "b.jsonl"]
    assert config.data.synthetic is None
    assert config.trainer.report_to == ["wandb"]
    assert config.report.controls is False
    assert config.model.learn.parts == {
        "patch_embed": "train",
        "vision_tower": "frozen",
        "projector": "train",
        "language_model": "frozen",
        "embeddings": "train",
    }
    assert config.trainer.save_total_limit is None
    assert config.name == "0012"


@pytest.mark.parametrize("words", [["[wandb]"], ['["wandb"]'], ["[", "wandb", "]"], ["wandb"]])
def test_a_list_is_understood_as_the_file_would_hold_it(good: Path, words: list[str]) -> None:
    assert load_config(good, ["--trainer.report-to", *words]).trainer.report_to == ["wandb"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--trainer.gradient-checkpointing"], True),
        (["--trainer.gradient-checkpointing=true"], True),
        (["--trainer.no-gradient-checkpointing"], False),
        (["--trainer.gradient-checkpointing", "vision_tower"], "vision_tower"),
        ([], False),
    ],
)
def test_a_switch_may_also_name_a_part(good: Path, words: list[str], value: bool | str) -> None:
    assert load_config(good, words).trainer.gradient_checkpointing == value


def test_a_part_that_has_no_layers_is_a_problem(good: Path) -> None:
    problems = problems_of(good, "--trainer.gradient-checkpointing", "projector")
    assert any("should be 'vision_tower' or 'language_model'" in problem for problem in problems)


def test_a_list_that_is_not_closed_is_a_problem(good: Path) -> None:
    assert problems_of(good, "--trainer.report-to", "[wandb") == (
        "--trainer.report-to: [wandb is not a list; write [a, b], or a b",
    )


def test_an_override_mends_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("[4, 4, 4]}", "[3, 4, 4]}"))
    assert problems_of(path)
    assert (
        load_config(path, ["--model.modalities.T1.patch-size", "2", "2", "2"]).model.modalities["T1"].num_patches == 64
    )


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "trainer: {learning_rate: 1e-5}\ndummy_loss: {scale: 1e-7}\n")
    assert load_config(path).trainer.learning_rate == 1e-5
    assert load_config(path).dummy_loss.scale == 1e-7


def test_yaml_words_that_are_not_text_are_refused_as_text(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, GOOD.replace("name: small", "name: 0012")))
    assert problem.startswith("name: input should be a valid string")


def test_duplicate_keys_are_listed_with_their_lines(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, GOOD + "name: again\ntrainer:\n  bf16: true\n  bf16: false\n"))
    assert problems == (
        "line 11: name stands here again, first on line 2",
        "line 14: bf16 stands here again, first on line 13",
    )


@pytest.mark.parametrize(
    ("text", "says"), [("- a\n", "holds a list"), ("a: [1\n", "not YAML"), ("a: !!python/x 1", "not YAML")]
)
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert says in problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*\n.*no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_secrets_are_refused_and_not_shown(good: Path) -> None:
    problems = problems_of(good, "--trainer.api-key", "hunter2", "--model.text-config.hub-token=hunter3")
    assert [problem.split(":")[0] for problem in problems] == ["model.text_config.hub_token", "trainer.api_key"]
    assert not any("hunter" in problem for problem in problems)


@pytest.mark.parametrize(
    "key", ["api_key", "wandb-api-key", "hub_token", "token", "password", "clientSecret", "HF_TOKEN", "apiKey"]
)
def test_keys_that_name_secrets_are_known(key: str) -> None:
    assert looks_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_new_tokens",
        "image_token_id",
        "pad_token",
        "num_key_value_heads",
        "key",
        "qk_layernorm",
        "eos_token_id",
    ],
)
def test_keys_about_words_are_not_secrets(key: str) -> None:
    assert not looks_secret(key)


def test_trainer_keys_are_the_names_of_training_arguments() -> None:
    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TrainerConfig.model_fields) - theirs == {"world_size", "engine", "gradient_scale", "parity_every"}
    schedulers = TrainerConfig.model_fields["lr_scheduler_type"].annotation.__args__
    assert set(schedulers) <= {scheduler.value for scheduler in SchedulerType}
    optimizers = TrainerConfig.model_fields["optim"].annotation.__args__
    assert set(optimizers) <= {optimizer.value for optimizer in OptimizerNames}


def test_pipeline_settings_are_those_of_the_pipeline() -> None:
    from umbrella_data.pipeline.augment import AugmentConfig
    from umbrella_data.pipeline.pipeline import PipelineConfig

    def fields(section: type) -> dict[str, object]:
        hidden = {"image_size", "augment"}
        found = {name: field for name, field in section.model_fields.items() if name not in hidden}
        return {name: (field.annotation, field.default, field.metadata) for name, field in found.items()}

    assert set(PipelineSettings.model_fields) == set(PipelineConfig.model_fields) - {"image_size"}
    assert fields(PipelineSettings) == fields(PipelineConfig)
    assert fields(AugmentSettings) == fields(AugmentConfig)


def test_weights_are_passed_on_where_the_mixing_uses_them(good: Path) -> None:
    rows = '[{"manifest": "a.jsonl", "weight": 3}, {"manifest": "b.jsonl"}]'
    words = ["--data.synthetic", "null", "--data.train", rows]
    assert load_config(good, [*words, "--data.mixing", "weights"]).data.mixing_weights == [3, 1]
    assert problems_of(good, *words) == ("data.train.0.weight: would not be used: mixing is proportional",)
    assert load_config(good).data.mixing_weights == "proportional"


def test_every_key_has_a_description() -> None:
    def undocumented(section: type, prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if not field.description:
                found.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                found += undocumented(field.annotation, f"{prefix}{name}.")
        return found

    assert undocumented(RunConfig) == []


def test_shipped_configs_load_and_say_what_they_mean() -> None:
    paths = sorted(demo_config_path().parent.glob("*.yaml"))
    assert [path.stem for path in paths] == ["bids_small", "demo", "llava_interleave_0.5b"]
    for path in paths:
        config = load_config(path)
        assert list(config.model.modalities) == ["T1", "rsfMRI", "dMRI"]
        # The token counts in the comments are those of the sizes beside them.
        for name, count in re.findall(r"^ +(\w+): \{image_size.*# ([\d,]+)", path.read_text(), flags=re.MULTILINE):
            assert config.model.modalities[name].num_patches == int(count.replace(",", "")), (path, name)
