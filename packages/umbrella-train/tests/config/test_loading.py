"""Loading a configuration: schema, strict YAML, overrides, and all problems at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from umbrella_train.config import (
    ConfigError,
    RunConfig,
    TrainerConfig,
    demo_config_path,
    dump_config,
    load_config,
)
from umbrella_train.config.strict_yaml import looks_secret, read_yaml

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


def paths_of(problems: tuple[str, ...]) -> list[str]:
    return sorted(problem.split(":")[0] for problem in problems)


def test_modalities_keep_their_order_and_get_canonical_names(good: Path) -> None:
    config = load_config(good)
    assert load_config(str(good)) == config
    assert list(config.model.modalities) == ["rsfMRI", "T1"]
    assert config.model.modalities["rsfMRI"].grid_size == (2, 2, 2, 2)
    assert config.model.modalities["rsfMRI"].num_patches == 16


def test_config_is_equal_after_dump_and_load(tmp_path: Path) -> None:
    config = load_config(None, ["--trainer.learning-rate", "1e-5", "--data.pipelines.T1.spacing", "2", "2", "2.5"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_output_dir_is_absolute(good: Path) -> None:
    assert load_config(good).output_dir == Path.cwd() / "runs"
    assert load_config(good, ["--output-dir", "mine"]).output_dir == Path.cwd() / "mine"


def test_config_is_frozen(good: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(good).name = "other"  # type: ignore[misc]


def test_all_problems_are_reported_at_once_with_dotted_paths(tmp_path: Path) -> None:
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
    assert paths_of(problems) == [
        "data.synthetic.num_train",
        "dummy_los",
        "model.modalities.T1",
        "model.text_config.model_type",
        "trainer.fp16",
        "trainer.learning_rat",
        "trainer.learning_rate",
        "trainer.max_steps",
    ]
    assert [problem.partition("did you mean ")[2] for problem in problems if "did you mean" in problem] == [
        "16,16,16?",
        "'learning_rate'?",
        "'dummy_loss'?",
    ]


# Overrides of a valid file, and the paths of all problems that they cause.
PROBLEMS: list[tuple[list[str], list[str]]] = [
    (
        [
            *("--model.modalities.rsfMRI.image-size", "8", "8", "8", "--data.mixing", "temperature"),
            *("--model.modalities.rsfMRI.patch-size", "4", "4", "4", "--trainer.bf16", "--trainer.fp16"),
        ],
        ["data.temperature", "model.modalities.rsfMRI", "trainer.fp16"],
    ),
    # Combinations of keys are checked in spite of other problems of their section ...
    (
        ["--data.max-length", "x", "--data.temperature", "2", "--data.max-bad-fraction", "0.5"],
        ["data.max_bad_fraction", "data.max_length", "data.temperature"],
    ),
    (["--trainer.bogus", "1", "--trainer.bf16", "--trainer.fp16"], ["trainer.bogus", "trainer.fp16"]),
    (
        ["--trainer.seed", "1", "--trainer.optim", "x", "--trainer.max-steps", "0"],
        ["trainer.max_steps", "trainer.optim", "trainer.seed"],
    ),
    (
        ["--trainer.logging-steps", "0", "--trainer.fp16", "--trainer.engine", "fsdp2", "--trainer.use-cpu"],
        ["trainer.engine", "trainer.logging_steps", "trainer.use_cpu"],
    ),
    (
        ["--trainer.fp16", "--trainer.on-non-finite", "skip", "--trainer.max-skipped-steps", "-1"],
        ["trainer.max_skipped_steps", "trainer.on_non_finite"],
    ),
    (
        ["--data.pipelines.T1.spacing", "x", "1", "1", "--data.pipelines.T3", "{}", "--seed", "-1"],
        ["data.pipelines.T1.spacing.0", "data.pipelines.T3", "seed"],
    ),
    (
        ["--model.learn.preset", "align", "--model.learn.learning-rates.vision-tower", "1", "--data.packing", "3"],
        ["data.packing", "model.learn.learning_rates.vision_tower"],
    ),
    (["--model", "3", "--data.temperature", "2"], ["data.temperature", "model"]),
    # ... but not combinations with an invalid value.
    (["--data.mixing", "temprature", "--data.temperature", "2"], ["data.mixing"]),
    (["--data.mixing", "temperature", "--data.temperature", "-1"], ["data.temperature"]),
    (["--data.on-bad-scan", "jump", "--data.max-bad-fraction", "0.5"], ["data.on_bad_scan"]),
    (["--data.synthetic", "3"], ["data.synthetic"]),
    (["--data.synthetic", "null", "--data.train.0.weight", "2"], ["data.train.0.manifest"]),
    (["--model.modalities.T1.image-size", "8", "8", "x"], ["model.modalities.T1w.image_size.2"]),
    (
        ["--model.modalities.T1.image-size", "8", "x", "8", "--model.pool.T1", "2", "--data.pipelines.T1", "{}"],
        ["model.modalities.T1w.image_size.1"],
    ),
    (
        [
            *("--model.modalities", '{"T1": {"image_size": [8, 8, 8]}}'),
            *("--model.text-config.max-position-embeddings", "4"),
        ],
        ["model.modalities.T1.patch_size"],
    ),
    (["--model.learn.preset", "x", "--model.learn.learning-rates.vision-tower", "1"], ["model.learn.preset"]),
    # One problem each.
    (["--model.modalities.T2", '{"image_size": [8, 8, 8], "patch_size": [4, 4, 4]}'], ["model.modalities.T2"]),
    (["--model.modalities.T1.image-size", "8", "8", "8", "8"], ["model.modalities.T1"]),
    (["--model.modalities.dwi", '{"image_size": [8, 8, 8, 4], "patch_size": [4, 4, 4, 4]}'], ["model.modalities.dMRI"]),
    (["--model.pool", '{"T1": 2, "T1w": 2}'], ["model.pool"]),
    (
        ["--model.pool", '{"dMRI": 2, "T1": 3, "rsfMRI": [2, 2, 2]}'],
        ["model.pool.T1", "model.pool.dMRI", "model.pool.rsfMRI"],
    ),
    (["--model.pretrained", "some/llava"], ["model.text_config", "model.vision_config"]),
    (["--model.vision-config", "null"], ["model.vision_config"]),
    (["--model.text-config", "{}"], ["model.text_config.model_type"]),
    (["--data.synthetic", "null"], ["data.synthetic"]),
    (["--data.train", '[{"manifest": "m.jsonl"}]'], ["data.synthetic"]),
    (["--data.pipelines.dMRI.spacing", "2", "2", "2"], ["data.pipelines.dMRI"]),
    (["--data.pipelines.T1", '{"spacing": [2, 2, 2], "interpolation": "area"}'], ["data.pipelines.T1"]),
    (["--name", "../up"], ["name"]),
    (["--trainer.report-to", "comet_ml"], ["trainer.report_to.0"]),
    # Overrides that cannot be applied are named as they were given.
    (["--trainer.learning-rate", "1", "2"], ["--trainer.learning-rate"]),
    (["--trainer.learning-rate"], ["--trainer.learning-rate"]),
    (["--data.train.3.manifest", "x"], ["--data.train.3.manifest"]),
    (["--name.first", "x"], ["--name.first"]),
    (["--trainer.report-to", "[wandb"], ["--trainer.report-to"]),
    (["stray"], ["stray"]),
]


@pytest.mark.parametrize(("overrides", "paths"), PROBLEMS)
def test_every_problem_is_reported_once_by_its_path(good: Path, overrides: list[str], paths: list[str]) -> None:
    assert paths_of(problems_of(good, *overrides)) == paths


def test_long_values_are_shortened_in_messages(good: Path) -> None:
    (problem,) = problems_of(good, "--seed", "x" * 1000)
    assert re.search(r"\(it is 'x+\.\.\.x+'\)$", problem)
    assert len(problem) < 200


def test_a_key_in_the_wrong_section_gets_the_right_one_suggested(good: Path) -> None:
    (problem,) = problems_of(good, "--learning-rate", "1e-3")
    assert problem.endswith("'trainer.learning_rate'?")


def test_two_names_of_one_modality_are_rejected(tmp_path: Path) -> None:
    text = GOOD.replace("data:", "    sMRI: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}\ndata:")
    assert paths_of(problems_of(write(tmp_path, text))) == ["model.modalities"]


def test_overrides_set_every_kind_of_key(good: Path) -> None:
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
def test_lists_are_accepted_in_yaml_and_as_separate_words(good: Path, words: list[str]) -> None:
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
def test_gradient_checkpointing_takes_a_switch_or_a_part(good: Path, words: list[str], value: bool | str) -> None:
    assert load_config(good, words).trainer.gradient_checkpointing == value


def test_gradient_checkpointing_rejects_a_part_without_layers(good: Path) -> None:
    problems = problems_of(good, "--trainer.gradient-checkpointing", "projector")
    assert all(path.startswith("trainer.gradient_checkpointing") for path in paths_of(problems))


def test_an_override_fixes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("[4, 4, 4]}", "[3, 4, 4]}"))
    assert problems_of(path)
    assert (
        load_config(path, ["--model.modalities.T1.patch-size", "2", "2", "2"]).model.modalities["T1"].num_patches == 64
    )


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "trainer: {learning_rate: 1e-5}\ndummy_loss: {scale: 1e-7}\n")
    assert load_config(path).trainer.learning_rate == 1e-5
    assert load_config(path).dummy_loss.scale == 1e-7


def test_a_yaml_number_is_rejected_as_text(tmp_path: Path) -> None:
    assert paths_of(problems_of(write(tmp_path, GOOD.replace("name: small", "name: 0012")))) == ["name"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]" for i in range(1, 10))]), "alias"),
        ("\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 9}]}}" for i in range(1, 9))]), "alias"),
        (f"a: &a [{'x,' * 1000}]\nb: [{'*a,' * 1000}]", "alias"),
        (f"a: &a {'x' * 100_000}\nb: [{'*a,' * 1000}]", "alias"),
        ("a: &a [*a]", "alias"),
        ("a: &a {b: *a}", "alias"),
        ("[" * 3000, "nested"),
    ],
)
def test_aliases_that_unfold_without_end_are_rejected(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert word in problem


@pytest.mark.parametrize("value", ["2024-13-45", "0x_", "!!int abc", "!!bool x", "!!timestamp x", "9" * 5000])
def test_a_value_that_yaml_cannot_read_is_named_by_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\nseed: {value}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert any("line 2" in problem or "seed" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.report-to", "[" * 3000],
        ["--model.text-config", "[" * 200_000],
        ["--data.train", f"[&a [{'x,' * 1000}], [{'*a,' * 1000}]]"],
    ],
)
def test_overrides_that_are_nested_or_unfold_without_end_are_one_problem(good: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(good, words)
    assert len(str(caught.value)) < 2000


def test_aliases_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: [1]}\nb: *a\nc: {<<: *a, x: 2}\n")
    assert read_yaml(path) == ({"a": {"x": 1, "y": [1]}, "b": {"x": 1, "y": [1]}, "c": {"x": 2, "y": [1]}}, [])


def test_duplicate_keys_are_listed_with_their_lines(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, GOOD + "name: again\ntrainer:\n  bf16: true\n  bf16: false\n"))
    assert [re.findall(r"\d+|name|bf16", problem) for problem in problems] == [
        ["11", "name", "2"],
        ["14", "bf16", "13"],
    ]


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n", "list"), ("a: [1\n", "not YAML"), ("a: !!python/x 1", "not YAML")]
)
def test_files_without_a_mapping_are_rejected(tmp_path: Path, text: str, words: str) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert words in problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*\n.*no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_secrets_are_rejected_and_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "report: {max_samples: {password: hunter4}}\n")
    problems = problems_of(path, "--trainer.api-key", "hunter2", "--model.text-config.auth.hub-token=hunter3")
    assert paths_of(problems) == ["model.text_config.auth.hub_token", "report.max_samples", "trainer.api_key"]
    assert sum("environment" in problem for problem in problems) == 2
    assert not any("hunter" in problem for problem in problems)


@pytest.mark.parametrize(
    "key", ["api_key", "wandb-api-key", "hub_token", "token", "password", "clientSecret", "HF_TOKEN", "apiKey"]
)
def test_keys_that_name_secrets_are_recognised(key: str) -> None:
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
def test_keys_of_vocabularies_and_attention_are_not_secrets(key: str) -> None:
    assert not looks_secret(key)


def test_trainer_keys_are_the_names_of_training_arguments() -> None:
    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TrainerConfig.model_fields) - theirs == {
        "world_size",
        "early_stopping_patience",  # of EarlyStoppingCallback
        "engine",
        "gradient_scale",
        "parity_every",
        "on_non_finite",
        "max_skipped_steps",
        "save_before_seconds",
    }
    schedulers = TrainerConfig.model_fields["lr_scheduler_type"].annotation.__args__
    assert set(schedulers) <= {scheduler.value for scheduler in SchedulerType}
    optimizers = TrainerConfig.model_fields["optim"].annotation.__args__
    assert set(optimizers) <= {optimizer.value for optimizer in OptimizerNames}


def test_weights_need_mixing_by_weights(good: Path) -> None:
    rows = '[{"manifest": "a.jsonl", "weight": 3}, {"manifest": "b.jsonl"}]'
    words = ["--data.synthetic", "null", "--data.train", rows]
    assert [each.weight for each in load_config(good, [*words, "--data.mixing", "weights"]).data.train] == [3, 1]
    (problem,) = problems_of(good, *words)
    assert problem.startswith("data.mixing: ")
    assert "train.0.weight" in problem
    assert "train.1" not in problem


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


def test_packaged_configs_load_and_state_their_token_counts() -> None:
    paths = sorted(demo_config_path().parent.glob("*.yaml"))
    names = ["bids_small", "demo", "llava_interleave_0.5b", "qwen3_0.6b_siglip2", "smollm2_135m", "t1_age_sex"]
    assert [path.stem for path in paths] == names
    for path in paths:
        config = load_config(path)
        expected = ["T1"] if path.stem == "t1_age_sex" else ["T1", "rsfMRI", "dMRI"]
        assert list(config.model.modalities) == expected
        # The comments behind the sizes hold the token counts.
        for name, count in re.findall(r"^ +(\w+): \{image_size.*# ([\d,]+)", path.read_text(), flags=re.MULTILINE):
            assert config.model.modalities[name].num_patches == int(count.replace(",", "")), (path, name)
