"""Stages of a configuration: merging, problems and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from umbrella_train.config import ConfigError, RunConfig, dump_config, load_config, stage_configs
from umbrella_train.config.loading import read_pipeline_options
from umbrella_train.config.model import ModelConfig
from umbrella_train.config.overrides import STAGE_SECTIONS, describe_keys
from umbrella_train.config.stages import WEIGHT_SOURCES

BASE = """
name: mine
output_dir: RUNS
model:
  vision_config: {model_type: siglip_vision_model, hidden_size: 8, num_attention_heads: 2}
  text_config: {model_type: qwen2, hidden_size: 8, num_attention_heads: 2}
  template_date: 2025-01-31
  pool: {T1: 2}
  modalities:
    rsfMRI: {image_size: [8, 8, 8, 4], patch_size: [4, 4, 4, 2]}
    T1w: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}
data:
  train: [{manifest: a.jsonl, weight: 2}, {manifest: b.jsonl}]
  mixing: weights
  pipelines: {T1w: {spacing: [2, 2, 2]}}
trainer: {learning_rate: 1.0e-3, max_steps: 50, report_to: [wandb, mlflow]}
"""
STAGES = """
stages:
  - name: align
    model: {learn: {preset: align}}
    trainer: {max_steps: 200}
  - name: instruct
    seed: 3
    model: {learn: {preset: lora}, modalities: {sMRI: {patch_size: [4, 4, 4]}}}
    data: {train: [{manifest: c.jsonl}], pipelines: {T1: {augment: {}}}}
    trainer: {max_steps: 600, learning_rate: 2.0e-4, report_to: []}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, STAGES)


def write(folder: Path, stages: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(BASE.replace("RUNS", str(folder / "runs")) + stages)
    return path


def paths_of(path: Path, *overrides: str, to_run: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, to_run=to_run)
    return sorted(problem.split(":")[0] for problem in caught.value.problems)


def test_stages_are_merged_over_the_run(file: Path, tmp_path: Path) -> None:
    align, instruct = stage_configs(load_config(file))
    top = tmp_path / "runs/mine"
    assert [(each.name, each.output_dir, each.seed) for each in (align, instruct)] == [
        ("align", top, 0),
        ("instruct", top, 3),
    ]
    assert (align.trainer.max_steps, align.trainer.learning_rate) == (200, 1e-3)
    assert (instruct.trainer.max_steps, instruct.trainer.learning_rate) == (600, 2e-4)
    assert (align.model.learn.preset, instruct.model.learn.preset) == ("align", "lora")
    # Tables are merged, whichever name of a modality they use; lists are replaced.
    t1 = instruct.model.modalities["T1"]
    assert (list(instruct.model.modalities), t1.image_size, t1.patch_size) == (["rsfMRI", "T1"], (8, 8, 8), (4, 4, 4))
    assert instruct.data.pipelines["T1"].spacing == (2, 2, 2)
    assert instruct.data.pipelines["T1"].augment is not None
    assert [source.manifest.name for source in align.data.train] == ["a.jsonl", "b.jsonl"]
    assert [source.manifest.name for source in instruct.data.train] == ["c.jsonl"]
    assert (align.trainer.report_to, instruct.trainer.report_to) == (["wandb", "mlflow"], [])
    assert align.stages == instruct.stages == []


def test_a_stage_starts_from_the_model_of_the_one_before(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    align, instruct = stage_configs(config)
    assert (align.model.pretrained, align.model.text_config) == (None, config.model.text_config)
    assert instruct.model.pretrained == str(tmp_path / "runs/mine/align/model")
    assert (instruct.model.vision_config, instruct.model.text_config) == (None, None)
    assert (instruct.model.pool, instruct.model.template_date) == (config.model.pool, config.model.template_date)
    assert [each.model.text_config for each in stage_configs(config, from_base=True)] == [config.model.text_config] * 2


def test_sources_of_weights_of_the_run_are_those_of_the_first_stage(tmp_path: Path) -> None:
    words = [
        *("--model.vision-config", "null", "--model.text-config", "null", "--model.pretrained", "org/llava"),
        *("--model.tokenizer", "org/words", "--model.init", "random"),
    ]
    align, instruct = (each.model for each in stage_configs(load_config(write(tmp_path, STAGES), words)))
    assert (align.pretrained, align.tokenizer, align.init) == ("org/llava", "org/words", "random")
    assert (instruct.tokenizer, instruct.init) == (None, "inflate")


def test_a_stage_with_its_own_weights_keeps_the_other_sources(tmp_path: Path) -> None:
    own = "model: {pretrained: org/other, text_config: null, vision_config: null}"
    path = write(
        tmp_path, f"stages: [{{name: a}}, {{name: b, {own}}}, {{name: c, model: {{tokenizer: org/own}}}}, {{name: d}}]"
    )
    _, b, c, d = (each.model for each in stage_configs(load_config(path, ["--model.init", "random"])))
    assert (b.pretrained, b.init) == ("org/other", "random")
    assert (c.pretrained, c.tokenizer, c.init) == (str(tmp_path / "runs/mine/b/model"), "org/own", "inflate")
    assert (d.pretrained, d.tokenizer) == (str(tmp_path / "runs/mine/c/model"), None)


def test_all_stages_have_one_synthetic_cohort(tmp_path: Path) -> None:
    data = "data: {train: [], mixing: proportional, synthetic: {num_train: 3}}"
    path = write(tmp_path, f"stages: [{{name: a, {data}}}, {{name: b, {data}}}]")
    directories = {each.cohort_directory for each in stage_configs(load_config(path))}
    assert directories == {tmp_path / "runs/synthetic-cohort"}


def test_a_config_with_stages_is_equal_after_dump_and_load(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    assert stage_configs(load_config(tmp_path / "dumped.yaml")) == stage_configs(config)
    for stage in stage_configs(config):
        assert "stages" not in yaml.safe_load(dump_config(stage))
        (tmp_path / "dumped.yaml").write_text(dump_config(stage))
        assert load_config(tmp_path / "dumped.yaml") == stage


def test_problems_of_all_stages_are_reported_at_once_by_their_paths(tmp_path: Path) -> None:
    stages = """
stages:
  - {name: a, stages: [], output_dir: x, trainr: {}, trainer: {learning_rat: 3, max_steps: -4}, model: 3}
  - {name: A, seed: -1, model: {modalities: {T1: {patch_size: [3, 4, 4]}}}, trainer: {bf16: true, fp16: true}}
  - {name: a-2, data: {pipelines: {T1: {}, T1w: {}}}}
  - {name: fold-1}
  - {name: ../up}
  - 4
  - {seed: true, data: null}
"""
    assert paths_of(write(tmp_path, stages), "--trainer.logging-steps", "x", "--stages.3.trainer.bogus", "1") == [
        "stages.0.model",
        "stages.0.output_dir",
        "stages.0.stages",
        "stages.0.trainer.learning_rat",
        "stages.0.trainer.max_steps",
        "stages.0.trainr",
        "stages.1.model.modalities.T1",
        "stages.1.name",
        "stages.1.seed",
        "stages.1.trainer.fp16",
        "stages.2.data.pipelines",
        "stages.2.name",
        "stages.3.name",
        "stages.3.trainer.bogus",
        "stages.4.name",
        "stages.5",
        "stages.6.data",
        "stages.6.name",
        "stages.6.seed",
        "trainer.logging_steps",
    ]


def test_messages_of_stages_have_did_you_mean(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: [{name: a, trainr: {}, trainer: {learning_rat: 1}, output_dir: x}]")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    words = [problem.partition(": ")[2] for problem in caught.value.problems]
    assert [word.partition("did you mean ")[2] for word in words] == ["'trainer'?", "", "'learning_rate'?"]
    assert "whole run" in words[1]


def test_only_the_model_of_an_earlier_stage_may_be_missing(tmp_path: Path) -> None:
    stages = "stages: [{name: a}, {name: b}, {name: c, model: {tokenizer: ./none}}]"
    assert paths_of(write(tmp_path, stages), to_run=True) == ["stages.2.model.tokenizer"]
    config = load_config(write(tmp_path, "stages: [{name: a}, {name: b}]"), to_run=True)
    assert len(stage_configs(config)) == 2


def test_overrides_apply_to_every_stage_and_those_of_a_stage_to_one(file: Path) -> None:
    words = [
        *("--stages.1.trainer.max-steps", "7", "--trainer.max-steps", "2", "--trainer.learning-rate", "1e-5"),
        *("--model.modalities.T1.patch-size", "4", "2", "2", "--seed", "9", "--report.no-controls"),
        *("--data.train.0.weight", "5", "--stages.0.trainer.bf16", "--stages.0.trainer.report-to", "wandb"),
        *("--name", "other"),
    ]
    align, instruct = stage_configs(load_config(file, words))
    assert (align.trainer.max_steps, instruct.trainer.max_steps) == (2, 7)
    for each in (align, instruct):
        assert (each.trainer.learning_rate, each.seed, each.report.controls) == (1e-5, 9, False)
        assert each.model.modalities["T1"].patch_size == (4, 2, 2)
        assert (each.data.train[0].weight, each.output_dir.name) == (5, "other")
    assert [source.manifest.name for source in instruct.data.train] == ["c.jsonl"]
    assert (align.trainer.bf16, instruct.trainer.bf16) == (True, False)
    assert (align.trainer.report_to, instruct.trainer.report_to) == (["wandb"], [])


def test_an_override_changes_one_place_of_a_yaml_alias(tmp_path: Path) -> None:
    stages = "stages: [{name: a, trainer: &same {max_steps: 3}}, {name: b, trainer: *same}]"
    config = load_config(write(tmp_path, stages), ["--stages.0.trainer.max-steps", "4"])
    assert [each.trainer.max_steps for each in stage_configs(config)] == [4, 3]


def test_overrides_add_and_remove_stages(file: Path) -> None:
    added = load_config(file, ["--stages.2.name", "more", "--stages.2.trainer.max-steps", "4"])
    assert [(each.name, each.trainer.max_steps) for each in stage_configs(added)][2] == ("more", 4)
    assert stage_configs(load_config(file, ["--stages", "[]"])) == []
    assert paths_of(file, "--stages.4.name", "x", "--stages.0.trainer.max-steps", "1", "2") == [
        "--stages.0.trainer.max-steps",
        "--stages.4.name",
    ]


def test_help_shows_the_keys_of_the_stages(tmp_path: Path) -> None:
    stages = """
stages:
  - {name: a, trainer: {max_steps: 3, bf16: true}, model: {template_date: 2024-01-01, pool: {T1: 2}}}
  - {name: b, data: {synthetic: null, train: [{manifest: c.jsonl}, {manifest: d.jsonl, weight: 2}]}, report: {}}
"""
    printed = describe_keys(load_config(write(tmp_path, stages)))
    for flag in ("--stages.0.name", "--stages.0.trainer.max-steps", "--stages.1.seed", "--trainer.max-steps"):
        assert flag in printed
    assert "--stages.0.name" in describe_keys(load_config(write(tmp_path, "")))


def test_cache_reads_the_manifests_of_all_stages(file: Path) -> None:
    assert [path.name for path, _ in read_pipeline_options(file).sources] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_stage_can_change_every_section() -> None:
    assert set(RunConfig.model_fields) - set(STAGE_SECTIONS) == {"name", "output_dir", "stages"}
    kept = {"modalities", "pool", "learn", "attn_implementation", "template_date", "vision_feature_layer"}
    assert set(ModelConfig.model_fields) - set(WEIGHT_SOURCES) == kept


GROWING = """
stages:
  - name: one
  - name: two
    model: {modalities: {dMRI: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}}}
"""


def test_a_stage_keeps_the_modalities_of_the_model_that_it_starts_from(tmp_path: Path) -> None:
    """Otherwise the stages before it would be trained in vain."""
    assert len(stage_configs(load_config(write(tmp_path, GROWING)))) == 2
    assert paths_of(write(tmp_path, GROWING + "  - {name: three}")) == ["stages.2.model.modalities"]
    changed = "{modalities: {T1: {patch_size: [2, 4, 4]}}, pool: {rsfMRI: 2}}"
    third = f"  - {{name: three, model: {changed}}}"
    with pytest.raises(ConfigError, match=r"T1, dMRI in the stage two"):
        load_config(write(tmp_path, GROWING + third))
    paths = ["stages.2.model.modalities", "stages.2.model.modalities.T1", "stages.2.model.pool.rsfMRI"]
    assert paths_of(write(tmp_path, GROWING + third)) == paths
    grown = GROWING.partition("model: ")[2].strip()
    same = f"  - {{name: three, model: {grown[:-1]}, pool: {{T1: [2, 2, 2]}}}}}}"
    assert len(stage_configs(load_config(write(tmp_path, GROWING + same)))) == 3
    # A stage with weights of its own may differ.
    own = "{pretrained: owner/name, text_config: null, vision_config: null, modalities"
    load_config(write(tmp_path, GROWING + third.replace("{modalities", own)))
