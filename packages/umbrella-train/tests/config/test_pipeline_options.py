"""Commands of umbrella-data read the configuration of a run through the entry point of umbrella_train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from umbrella_data.cli import main
from umbrella_data.cli.pipeline_options import options_from_run
from umbrella_data.pipeline.config import AugmentConfig, PipelineConfig, PipelineSettings
from umbrella_data.synthetic.cohort import make_demo_cohort
from umbrella_train.config import demo_config_path, load_config
from umbrella_train.config.problems import ConfigError

CONFIG = """
model:
  vision_config: {model_type: siglip_vision_model}
  text_config: {model_type: qwen2}
  modalities:
    T1w: {image_size: [16, 16, 8], patch_size: [8, 8, 4]}
    rsfMRI: {image_size: [8, 8, 8, 4], patch_size: [4, 4, 4, 2]}
data:
  train: [{manifest: a.jsonl, data_root: scans}]
  evaluation: [{manifest: b.jsonl}]
  cache_dir: cache
  pipelines: {sMRI: {normalise: zscore, augment: {noise_std: 0.1}}}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_options_hold_pipelines_patches_manifests_and_cache(path: Path) -> None:
    options = options_from_run(path)
    assert options.configs == {
        "T1": PipelineConfig(image_size=(16, 16, 8), normalise="zscore", augment={"noise_std": 0.1}),
        "rsfMRI": PipelineConfig(image_size=(8, 8, 8, 4)),
    }
    assert options.patch_sizes == {"T1": (8, 8, 4), "rsfMRI": (4, 4, 4, 2)}
    folder = path.parent
    assert options.sources == [(folder / "a.jsonl", folder / "scans"), (folder / "b.jsonl", None)]
    assert options.cache_dir == folder / "cache"


@pytest.mark.parametrize(("synthetic", "folder"), [("{}", "runs/synthetic-cohort"), ("{directory: mine}", "mine")])
def test_options_name_the_manifests_of_the_demo_cohort(path: Path, synthetic: str, folder: str) -> None:
    head, _, tail = CONFIG.partition("  train:")
    path.write_text(f"{head}  synthetic: {synthetic}\n  cache_dir{tail.partition('cache_dir')[2]}")
    cohort = path.parent / folder
    assert options_from_run(path).sources == [(cohort / "train.jsonl", None), (cohort / "test.jsonl", None)]


def test_cache_command_prepares_the_scans_of_the_demo(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_demo_cohort(path.parent / "runs" / "synthetic-cohort", num_train=2, num_test=1, seed=0)
    assert main(["cache", "--config", str(demo_config_path()), "--workers", "1"]) == 0
    assert len(list((path.parent / "runs" / "cache").glob("volumes/*/*"))) == 9


def test_commands_report_every_problem_of_the_configuration(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(CONFIG.replace("noise_std", "noise").replace("patch_size: [8, 8, 4]", "patch_size: [8, 8, 3]"))
    assert main(["preview", "--config", str(path), "--out", "page"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert "  data.pipelines.sMRI.augment.noise: no such key; did you mean 'noise_std'?\n" in error
    assert "  model.modalities.T1: " in error
    assert not Path("page").exists()


LIST = "augment: [{name: RandFlip, spatial_axis: 1}, {name: RandGaussianNoise, std: 0.1}]"


def test_augment_takes_a_list_and_overrides_of_its_entries(path: Path) -> None:
    path.write_text(CONFIG.replace("augment: {noise_std: 0.1}", LIST))
    key = "--data.pipelines.T1.augment"
    config = load_config(path, [f"{key}.0.spatial-axis", "[1, 2]", f"{key}.1.std", "0.2"])
    assert config.data.pipelines["T1"] == PipelineSettings(
        normalise="zscore",
        augment=[{"name": "RandFlip", "spatial_axis": [1, 2]}, {"name": "RandGaussianNoise", "std": 0.2}],
    )
    assert load_config(path, [key, '{"noise_std": 0.3}']).data.pipelines["T1"].augment == AugmentConfig(noise_std=0.3)


def test_list_of_the_readme_is_valid() -> None:
    readme = (Path(__file__).parents[3] / "umbrella-data" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    augment = PipelineSettings(**yaml.safe_load(block)["data"]["pipelines"]["T1"]).augment
    assert isinstance(augment, tuple)
    assert len(augment) == 3


def test_problems_of_augment_have_their_paths(path: Path) -> None:
    wrong = LIST.replace("RandGaussianNoise, std", "RandGaussianNoise, stdd").replace("RandFlip", "RandFilp")
    path.write_text(CONFIG.replace("augment: {noise_std: 0.1}", wrong))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    name, argument = caught.value.problems
    assert name.startswith("data.pipelines.sMRI.augment.0.name: ")
    assert "did you mean 'RandFlip'" in name
    assert argument.startswith("data.pipelines.sMRI.augment.1.stdd: ")
    assert "did you mean 'std'" in argument


@pytest.mark.parametrize(
    ("entry", "key", "settings"),
    [
        ("{name: RandFlip, spatial_axis: 0}", "sMRI.augment.0.spatial_axis", "allow_left_right: true"),
        ("{name: RandRotate90, spatial_axes: [1, 2]}", "T1.augment.0.spatial_axes", None),
    ],
)
def test_augment_that_does_not_fit_is_reported(path: Path, entry: str, key: str, settings: str | None) -> None:
    path.write_text(CONFIG.replace("augment: {noise_std: 0.1}", f"augment: [{entry}]"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"data.pipelines.{key}: ")
    if settings is not None:
        path.write_text(CONFIG.replace("augment: {noise_std: 0.1}", f"augment: [{entry}], {settings}"))
        assert load_config(path).data.pipelines["T1"].allow_left_right
