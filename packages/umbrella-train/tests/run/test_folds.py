"""Cross-validation, end to end on a tiny cohort: runs of folds, resuming, job arrays, and the pooled report."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella_data.manifest.sample import subject_key
from umbrella_data.privacy import names_by_hash
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_train import cli
from umbrella_train.assembly.predict import find_model
from umbrella_train.assembly.subject_parts import open_source
from umbrella_train.config import RunConfig, load_config
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.metrics import Prediction, summarise
from umbrella_train.report import build_report
from umbrella_train.run import folds as folds_module
from umbrella_train.run import in_turn, training
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.folds import train_folds
from umbrella_train.run_folder import fold_folders

MakeConfig = Callable[..., RunConfig]
NUM_FOLDS = 2


def config_in(make_config: MakeConfig, folder: Path) -> RunConfig:
    trainer = {"max_steps": 2, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 9, "save_steps": 1}
    report = {"enabled": True, "controls": True, "max_new_tokens": 2, "pictures": False}
    return make_config(folder, trainer=trainer, report=report, data={"calibration_fraction": 0.3})


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return config_in(make_config, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> Path:
    """Two folds of three subjects, of which one calibrates, trained by one command."""
    path = train_folds(config, num_folds=NUM_FOLDS)
    assert path is not None
    return path


@pytest.fixture
def pooled(trained: Path, tmp_path: Path) -> Path:
    """A copy of the folder of the folds."""
    return shutil.copytree(trained, tmp_path / "run")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions_of(folder: Path) -> list[dict[str, Any]]:
    """The predictions with names of subjects instead of hashes."""
    names = names_by_hash([folder])
    return [{**row, "subject": names[row["subject"]]} for row in lines_of(folder / "predictions.jsonl")]


def test_every_subject_is_tested_once_by_a_model_of_the_others(trained: Path, cohort: DemoCohort) -> None:
    assert {path.name for path in trained.iterdir()} >= {"fold-1", "fold-2", "config.yaml", "report.html", "FINISHED"}
    rows = [predictions_of(fold) for fold in fold_folders(trained)]
    assert predictions_of(trained) == rows[0] + rows[1]
    tested = [{row["subject"] for row in each} for each in rows]
    subjects = {json.loads(line)["subject"] for line in cohort.train_manifest.read_text().splitlines()}
    assert tested[0] | tested[1] == subjects
    assert [len(each) for each in tested] == [3, 3]
    hashes = {row["subject"] for row in lines_of(trained / "predictions.jsonl")}
    assert len(hashes) == len(subjects)
    assert hashes.isdisjoint(row["subject"] for row in lines_of(trained / "fold-1/predictions.jsonl"))


def test_pooled_figures_are_those_of_all_answers(trained: Path) -> None:
    (metrics,) = lines_of(trained / "metrics.jsonl")
    rows = lines_of(trained / "predictions.jsonl")
    expected = summarise([Prediction(**{**row, "options": tuple(row["options"])}) for row in rows])
    assert expected["eval/subjects/T1"] == 6
    assert {key: metrics[key] for key in expected} == expected
    assert (metrics["step"], metrics["folds/models"]) == (2, 2)
    figures = [lines_of(fold / "metrics.jsonl")[-1]["eval/accuracy/T1"] for fold in fold_folders(trained)]
    spread = [metrics[f"eval/accuracy_fold_{side}/T1"] for side in ("mean", "min", "max")]
    assert spread == [sum(figures) / 2, min(figures), max(figures)]
    assert metrics["eval/accuracy/T1"] == pytest.approx(sum(figures) / 2)  # folds of one size


def test_pooled_folder_is_read_like_a_run(trained: Path, config: RunConfig, cohort: DemoCohort) -> None:
    assert load_config(trained / "config.yaml") == config
    page = (trained / "report.html").read_text()
    assert "pooled over 2 models, each tested on subjects that it was not trained on" in page
    assert "accuracy of T1 by fold" in page
    assert "2 steps on" in page
    assert "did not finish" not in page
    subjects = {json.loads(line)["subject"] for line in cohort.train_manifest.read_text().splitlines()}
    pattern = re.compile("|".join(subjects).encode())
    files = [path for path in trained.rglob("*") if path.is_file() and path.name not in ("config.yaml", "names.jsonl")]
    assert len(files) > 15
    assert [path.name for path in files if pattern.search(path.read_bytes())] == []
    for name in ("salt", "names.jsonl"):
        assert (trained / name).stat().st_mode & 0o777 == 0o600


def test_calibration_subjects_are_in_no_batch(config: RunConfig) -> None:
    sources = training.prepare_sources(folds_module._config_of(config, 1, num_folds=NUM_FOLDS))
    subjects = [
        {subject_key(sample.subject) for source in part for sample in open_source(source)}
        for part in (sources.train, sources.evaluation, sources.calibration)
    ]
    assert [len(each) for each in subjects] == [2, 3, 1]


def test_array_of_folds_is_the_same_as_one_command(make_config: MakeConfig, trained: Path, tmp_path: Path) -> None:
    config = config_in(make_config, tmp_path)
    first = train_folds(config, num_folds=NUM_FOLDS, fold=2, resume="auto")
    assert first == tmp_path / "run/fold-2"
    assert not (tmp_path / "run/predictions.jsonl").exists()
    assert train_folds(config, num_folds=NUM_FOLDS, fold=1, resume="auto") == tmp_path / "run"
    assert predictions_of(tmp_path / "run") == predictions_of(trained)
    one, other = (
        UmbrellaForConditionalGeneration.from_pretrained(folder / "fold-2/model").state_dict()
        for folder in (trained, tmp_path / "run")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unfinished_fold_is_resumed_and_finished_ones_are_skipped(
    make_config: MakeConfig, trained: Path, pooled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(make_config, tmp_path)
    for fold in fold_folders(pooled):
        text = (fold / "config.yaml").read_text()
        (fold / "config.yaml").write_text(text.replace(str(trained), str(pooled)))
    shutil.rmtree(pooled / "fold-2/checkpoint-2")
    for name in ("FINISHED", "predictions.jsonl"):
        (pooled / "fold-2" / name).unlink()
    started: list[str] = []
    evaluate = training.evaluate_sources

    def count(*args: Any, **options: Any) -> Any:
        started.append(options["config"].name)
        return evaluate(*args, **options)

    monkeypatch.setattr(training, "evaluate_sources", count)
    assert train_folds(config, num_folds=NUM_FOLDS, resume="auto") == pooled
    assert started == ["fold-2"]
    assert predictions_of(pooled) == predictions_of(trained)
    assert train_folds(config, num_folds=NUM_FOLDS, resume="auto") == pooled
    assert started == ["fold-2"]


def test_report_command_pools_again(trained: Path, pooled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.html", "predictions.jsonl", "metrics.jsonl", "config.yaml"):
        (pooled / name).unlink()
    cli.report_command([str(pooled)])
    assert capsys.readouterr().out.strip() == str(pooled / "report.html")
    assert predictions_of(pooled) == predictions_of(trained)
    (pooled / "fold-1/FINISHED").unlink()
    shutil.rmtree(pooled / "fold-2")
    with pytest.raises(SystemExit) as caught:
        cli.report_command([str(pooled)])
    assert caught.value.code == 2
    assert "fold-1, fold-2" in capsys.readouterr().err


def test_folds_without_their_tables_of_names_keep_their_hashes(pooled: Path) -> None:
    (pooled / "fold-1/names.jsonl").unlink()
    build_report([pooled])
    pooled_hashes, hashes = (
        {row["subject"] for row in lines_of(folder / "predictions.jsonl")} for folder in (pooled, pooled / "fold-1")
    )
    assert hashes < pooled_hashes
    assert len(pooled_hashes) == 6


def test_hashes_in_pooled_texts_are_those_of_the_pooled_folder(pooled: Path) -> None:
    path = pooled / "fold-1/predictions.jsonl"
    rows = [row | {"question": f"Is {row['subject']}_ses-1 old?"} for row in lines_of(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_report([pooled])
    own = lines_of(pooled / "predictions.jsonl")[: len(rows)]
    assert [row["question"] for row in own] == [f"Is {row['subject']}_ses-1 old?" for row in own]


@pytest.mark.parametrize(
    ("key", "old", "new"), [("seed", "seed: 0", "seed: 1"), ("data.num_folds", "num_folds: 2", "num_folds: 3")]
)
def test_folds_of_several_splits_are_not_pooled(pooled: Path, key: str, old: str, new: str) -> None:
    text = (pooled / "fold-2/config.yaml").read_text()
    (pooled / "fold-2/config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(RunError, match=f"different {key}"):
        build_report([pooled])


def test_spread_is_over_the_figures_of_the_folds(pooled: Path) -> None:
    for fold, value in zip(fold_folders(pooled), (0.75, 0.25), strict=True):
        with (fold / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 2, "eval/questions/T1/a": 4, "eval/accuracy/T1/a": value}) + "\n")
    page = build_report([pooled]).read_text()
    (metrics,) = lines_of(pooled / "metrics.jsonl")
    assert [metrics[f"eval/accuracy_fold_{side}/T1/a"] for side in ("mean", "min", "max")] == [0.5, 0.25, 0.75]
    assert "accuracy of T1/a by fold: mean 0.5, from 0.25 to 0.75" in page


def test_baselines_of_all_folds_are_pooled(pooled: Path) -> None:
    for fold in fold_folders(pooled):
        assert not (pooled / "baselines.jsonl").exists()
        rows = [row for row in lines_of(fold / "predictions.jsonl") if row["condition"] == "accuracy"]
        text = "".join(json.dumps({"baseline": "volume", **row}) + "\n" for row in rows)
        (fold / "baselines.jsonl").write_text(text)
        build_report([pooled])
    (metrics,) = lines_of(pooled / "metrics.jsonl")
    assert metrics["baseline/volume/subjects/T1"] == 6
    assert metrics["baseline/volume/accuracy/T1"] == metrics["eval/accuracy/T1"]
    subjects = {row["subject"] for row in lines_of(pooled / "predictions.jsonl")}
    assert {row["subject"] for row in lines_of(pooled / "baselines.jsonl")} == subjects
    (pooled / "fold-2/baselines.jsonl").unlink()
    build_report([pooled])
    assert not (pooled / "baselines.jsonl").exists()
    assert not any(key.startswith("baseline/") for key in lines_of(pooled / "metrics.jsonl")[0])


def test_a_fold_without_answers_adds_none(pooled: Path) -> None:
    (pooled / "fold-2/predictions.jsonl").write_text("")
    build_report([pooled])
    assert predictions_of(pooled) == predictions_of(pooled / "fold-1")
    (pooled / "fold-2/predictions.jsonl").unlink()
    with pytest.raises(RunError, match=r"fold-2.predictions\.jsonl: is missing"):
        build_report([pooled])


def test_texts_are_scored_with_the_lexicon_of_the_run(pooled: Path, tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("left: [esquerda]\nright: [direita]\nbilateral: [ambos]\n")
    for fold in fold_folders(pooled):
        rows = lines_of(fold / "predictions.jsonl")
        for row in rows:
            row |= {"type": "text", "answer": "esquerda", "predicted": "direita", "generated": "direita", "score": 0.0}
        (fold / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = (fold / "config.yaml").read_text()
        assert "laterality_lexicon: null" in text
        words = f"laterality_lexicon: {tmp_path / 'words.yaml'}"
        (fold / "config.yaml").write_text(text.replace("laterality_lexicon: null", words))
    build_report([pooled])
    (metrics,) = lines_of(pooled / "metrics.jsonl")
    assert {value for key, value in metrics.items() if key.startswith("eval/laterality_f1/")} == {0.0}


def test_subject_in_two_folds_is_an_error(pooled: Path) -> None:
    rows = lines_of(pooled / "fold-2/names.jsonl")
    first = names_by_hash([pooled / "fold-1"])[lines_of(pooled / "fold-1/predictions.jsonl")[0]["subject"]]
    text = "".join(json.dumps([pseudonym, first.removeprefix("sub-")]) + "\n" for pseudonym, _ in rows)
    (pooled / "fold-2/names.jsonl").write_text(text)
    with pytest.raises(RunError, match="fold-1 and fold-2"):
        build_report([pooled])


def test_different_settings_and_notes_of_folds_are_in_the_report(pooled: Path) -> None:
    text = (pooled / "fold-2/config.yaml").read_text()
    (pooled / "fold-2/config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    with (pooled / "fold-2/metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "overlap/subjects": 0, "overlap/files": 3}\n')
    page = build_report([pooled]).read_text()
    assert "trainer.learning_rate" in page.partition("The folds have different settings")[2][:60]
    assert "fold-2: Not held out" in page
    assert "subjects that are not held out" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_folds": 1}, "--folds 1"),
        ({"num_folds": 2, "fold": 3}, "--fold 3"),
        ({"num_folds": 2}, "--resume auto"),
        ({"num_folds": 2, "fold": 2}, "fold-2"),
        ({"num_folds": 2, "resume": "runs/other"}, "runs/other"),
        ({"num_folds": 3, "fold": 3, "resume": "auto"}, "--folds 2, not 3"),
    ],
)
def test_wrong_folds_are_errors(config: RunConfig, trained: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=words):
        train_folds(config, **options)


def test_folds_are_given_once_and_in_a_folder_of_their_own(config: RunConfig, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"num_folds": 2, "fold": 1})
    with pytest.raises(RunError, match=r"data\.num_folds"):
        train_folds(config.model_copy(update={"data": data}), num_folds=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("{}")
    with pytest.raises(RunError, match="without folds"):
        train_folds(config.model_copy(update={"output_dir": tmp_path}), num_folds=2)


def test_fold_is_evaluated_again_on_its_subjects(trained: Path, pooled: Path, cohort: DemoCohort) -> None:
    fold = pooled / "fold-2"
    metrics = evaluate_run(fold, controls=False)
    scored = lines_of(trained / "fold-2/metrics.jsonl")[-1]
    assert metrics.items() <= scored.items()
    with pytest.raises(RunError, match="fold-1"):
        evaluate_run(pooled)
    with pytest.raises(RunError, match="fold-1"):
        find_model(pooled)
    # The split of another manifest is another one.
    rows = cohort.train_manifest.read_text().splitlines(keepends=True)
    changed = cohort.train_manifest.with_name("changed.jsonl")
    changed.write_text("".join(rows[3:]))
    text = (fold / "config.yaml").read_text()
    (fold / "config.yaml").write_text(text.replace(str(cohort.train_manifest), str(changed)))
    with pytest.raises(RunError, match=r"data\.train\.0\.content"):
        evaluate_run(fold)
    assert evaluate_run(fold, manifests=[cohort.test_manifest], controls=False)["eval/subjects/T1"] == 2


def test_folder_of_folds_is_no_run_to_resume(config: RunConfig, trained: Path) -> None:
    from umbrella_train.checkpoint.resume import _runs

    assert _runs(config) == []
    assert [path.name for path in _runs(folds_module._config_of(config, 1, num_folds=2))] == ["fold-1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_a_fold_stops_all(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    started: list[str] = []

    def train(config: RunConfig, **_: Any) -> Path:
        started.append(config.name)
        config.output_dir.mkdir(exist_ok=True)
        raise RunStoppedError(config.output_dir / config.name, step=3, signal_number=number)

    monkeypatch.setattr(in_turn, "train", train)
    with pytest.raises(RunStoppedError) as caught:
        train_folds(config_in(make_config, tmp_path), num_folds=3)
    assert (started, caught.value.signal_number) == (["fold-1"], number)
    assert (tmp_path / "run/REQUEUE").exists() == (number == signal.SIGTERM)


def test_fold_without_time_stops_as_at_a_deadline(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    clock = iter([0.0, 0.0, 890.0])

    def train(config: RunConfig, *, max_time: float, **_: Any) -> Path:
        config.output_dir.mkdir(exist_ok=True)
        times.append(max_time)
        return config.output_dir / config.name

    monkeypatch.setattr(in_turn, "train", train)
    monkeypatch.setattr("umbrella_train.run.in_turn.time.monotonic", lambda: next(clock))
    with pytest.raises(RunStoppedError) as caught:
        train_folds(config_in(make_config, tmp_path), num_folds=2, max_time=900)
    assert (times, caught.value.signal_number) == ([900.0], signal.SIGUSR1)
    assert (tmp_path / "run/REQUEUE").exists()


def test_command_passes_folds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def train(config: RunConfig, **options: Any) -> Path:
        calls.append({"steps": config.trainer.max_steps, **options})
        return tmp_path

    monkeypatch.setattr(folds_module, "train_folds", train)
    cli.train_command(["--folds", "5", "--fold", "2", "--resume", "auto", "--trainer.max-steps", "7"])
    assert calls == [
        {
            "steps": 7,
            "num_folds": 5,
            "fold": 2,
            "dry_run": False,
            "resume": "auto",
            "allow_changed": [],
            "max_time": None,
        }
    ]
    for words in (["--fold", "2"], ["--folds", "0"], ["--fodls", "3"]):
        with pytest.raises(SystemExit) as caught:
            cli.train_command(words)
        assert caught.value.code == 2
    assert len(calls) == 1
    assert "--folds" in capsys.readouterr().err
