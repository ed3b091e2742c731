"""Sources of samples: the manifests of the config, or a synthetic cohort that is written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.assembly.sources import (
    Sources,
    find_answer_spaces,
    find_sources,
    prepare_sources,
    warn_of_repeated_fits,
)
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.errors import RunError

MakeConfig = Callable[..., RunConfig]
SYNTHETIC = {"num_train": 1, "num_test": 1, "seed": 3}


def test_manifests_are_those_of_the_config(make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path) -> None:
    sources = prepare_sources(make_config(tmp_path))
    assert [source.manifest for source in sources.train] == [cohort.train_manifest]
    assert [source.manifest for source in sources.evaluation] == [cohort.test_manifest]
    assert list(tmp_path.iterdir()) == []


def test_long_manifest_is_warned_of_and_only_its_modalities_are_checked(
    make_config: MakeConfig,
    cohort: DemoCohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("umbrella_train.assembly.sources.MAX_ROWS_CHECKED", 17)  # of 18, and 6 held out
    prepare_sources(make_config(tmp_path))
    (message,) = [each.getMessage() for each in caplog.records if each.name == "umbrella_train.assembly.sources"]
    assert f"{cohort.train_manifest}: has 18 rows" in message
    assert f"umbrella-data check {cohort.train_manifest}" in message
    modalities = {"T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}}
    config = make_config(tmp_path, model={"modalities": modalities}, data={"pipelines": {}, "evaluation": []})
    with pytest.raises(RunError, match=r"train\.jsonl: has dMRI scans"):
        prepare_sources(config)


@pytest.mark.parametrize(
    ("kind", "has_cache", "is_warned"),
    [("dwi", False, True), ("dwi", True, False), ("maps", False, False), ("T1", False, False)],
)
def test_dwis_without_a_cache_are_warned_of(
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    has_cache: bool,
    is_warned: bool,
) -> None:
    images = {
        "T1": {"modality": "T1w", "path": "t1.nii.gz"},
        "dwi": {"modality": "dwi", "path": "dwi.nii.gz"},
        "maps": {"modality": "dMRI", "path": ["fa.nii.gz", "md.nii.gz"]},
    }
    rows = []
    for number, image in enumerate([images["T1"], images[kind]]):
        question = [{"type": "image", **image}, {"type": "text", "text": "Which?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "this"}]
        rows.append(json.dumps({"id": str(number), "subject": "a", "messages": messages}))
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(rows))  # none of the scans exists
    config = make_config(tmp_path)
    if not has_cache:
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": None})})
    warn_of_repeated_fits(Sources([DatasetConfig(manifest=manifest)], []), config=config)
    assert [each.args for each in caplog.records] == ([(manifest,)] if is_warned else [])


def config_of(make_config: MakeConfig, output_dir: Path, directory: Path | None) -> RunConfig:
    synthetic = {**SYNTHETIC, "directory": directory}
    return make_config(output_dir, data={"train": [], "evaluation": [], "synthetic": synthetic})


@pytest.mark.parametrize("is_named", [True, False])
def test_synthetic_cohort_is_written_once(make_config: MakeConfig, tmp_path: Path, is_named: bool) -> None:
    directory = tmp_path / "named" if is_named else None
    config = config_of(make_config, tmp_path / "runs", directory)
    sources = prepare_sources(config)
    (train,), (test,) = sources.train, sources.evaluation
    assert train.manifest.parent == (directory or tmp_path / "runs" / "synthetic-cohort")
    assert train.manifest != test.manifest
    assert len(train.manifest.read_text().splitlines()) == len(test.manifest.read_text().splitlines()) == 3
    written = {path: path.stat().st_mtime_ns for path in train.manifest.parent.rglob("*.nii.gz")}
    assert len(written) == 6
    assert prepare_sources(config) == sources
    assert {path: path.stat().st_mtime_ns for path in train.manifest.parent.rglob("*.nii.gz")} == written


def test_both_splits_of_an_existing_run_are_found(make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    found = find_sources(config)
    assert [source.manifest for source in (*found.train, *found.evaluation)] == [
        cohort.train_manifest,
        cohort.test_manifest,
    ]
    synthetic = {**SYNTHETIC, "directory": str(tmp_path / "cohort")}
    config = make_config(tmp_path, data={"train": [], "evaluation": [], "synthetic": synthetic})
    with pytest.raises(RunError, match="the synthetic cohort of this run is missing"):
        find_sources(config)
    assert find_sources(config, [DatasetConfig(manifest=cohort.test_manifest)]).train == ()
    written = prepare_sources(config)
    assert find_sources(config) == written


def test_a_grid_of_a_task_without_numbers_in_training_is_an_error(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path
) -> None:
    config = make_config(tmp_path, report={"number_grids": {"lesion_size": [0, 1, 0.5]}})
    with pytest.raises(RunError, match=r"report\.number_grids: .*task lesion_size;"):
        find_answer_spaces([DatasetConfig(manifest=cohort.train_manifest)], config=config)
