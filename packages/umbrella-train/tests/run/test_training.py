"""From a config to a scored run, end to end on a tiny cohort."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella_data.cli import main as umbrella_data
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_train.checkpoint.integrity import checkpoint_problems
from umbrella_train.config import RunConfig, dump_config, load_config
from umbrella_train.config.metric_keys import metric_key
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.run import training as run
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.training import train
from umbrella_train.trainer.arguments import build_arguments
from umbrella_train.trainer.checkpoints import Checkpoints

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(
        tmp_path_factory.mktemp("runs"),
        trainer={
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 6,
            "save_steps": 2,
            "eval_steps": 2,
            "logging_steps": 2,
            "use_cpu": True,
        },
        report={"enabled": True, "pictures": True, "controls": True, "max_new_tokens": 2},
    )


@pytest.fixture(scope="module")
def folder(config: RunConfig) -> Path:
    """A finished run of four steps."""
    path = train(config)
    assert path is not None
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_folder_has_the_files_of_a_run(folder: Path, config: RunConfig) -> None:
    assert folder == config.output_dir / "run"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "predictions.jsonl",
        "checkpoint-2",
        "checkpoint-4",
        "model",
        "report.html",
    } <= names
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (folder / "model").iterdir()
    }
    assert load_config(folder / "config.yaml") == config
    assert (folder / "salt").stat().st_mode & 0o777 == 0o600
    # A pickle can run code when it is read.
    assert [path.name for path in folder.rglob("training_args.bin")] == []


def test_metrics_have_loss_gradients_and_evaluation(folder: Path) -> None:
    rows = rows_of(folder)
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4]
    for row in losses:
        assert {"learning_rate", "loss", "step"} <= row.keys()
        assert sum(key.startswith("grad/[") for key in row) == 6
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    for row in rows:
        if "eval_loss" in row:
            assert {"eval/loss/T1", "eval/loss/rsfMRI", "eval/loss/dMRI"} <= row.keys()
    (scores,) = [row for row in rows if "eval/accuracy/T1" in row]
    assert scores["step"] == 4
    for modality in ("T1", "rsfMRI", "dMRI"):
        for condition in ("accuracy", "shuffled", "no_scan"):
            assert 0 <= scores[f"eval/{condition}/{modality}"] <= 1


def test_every_figure_is_in_the_readme(folder: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", readme.split("## Evaluation", 1)[1]))
    added = re.compile(r"(_lower|_upper|_shuffled|_swapped|_no_scan)+$")
    keys = {key for row in rows_of(folder) for key in row if re.match(r"eval/(?!loss/)", key)}
    labels = {added.sub("", key.split("/")[1]) for key in keys}
    assert {"accuracy", "auroc", "brier"} <= labels
    assert labels <= named


def test_no_subject_is_named_except_in_the_config_and_the_table_of_names(
    folder: Path, cohort: DemoCohort, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = (cohort.train_manifest, cohort.test_manifest)
    subjects = {json.loads(line)["subject"] for path in manifests for line in path.read_text().splitlines()}
    assert len(subjects) == 8
    pattern = re.compile("|".join(subjects).encode())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    files.remove(folder / "names.jsonl")  # the table for umbrella-data whois, readable by its owner only
    assert len(files) > 15
    assert [path.name for path in files if pattern.search(path.read_bytes())] == []
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["subject"] for row in predictions}) == 2
    for pseudonym in {row["subject"] for row in predictions}:
        assert re.fullmatch(r"[0-9a-f]{16}", pseudonym)
        assert umbrella_data(["whois", pseudonym, "--in", str(folder)]) == 0
    assert set(capsys.readouterr().out.split()) <= subjects
    assert (folder / "names.jsonl").stat().st_mode & 0o777 == 0o600


def test_picture_of_each_modality_is_drawn(folder: Path) -> None:
    pictures = {path.stem for path in (folder / "pictures").glob("*.png")}
    assert pictures == {"T1", "rsfMRI", "dMRI"}


def test_saved_model_equals_the_last_checkpoint(folder: Path) -> None:
    saved, last = (
        UmbrellaForConditionalGeneration.from_pretrained(folder / name).state_dict()
        for name in ("model", "checkpoint-4")
    )
    assert all(torch.equal(saved[name], last[name]) for name in last)


def test_repeated_evaluation_gives_the_same_numbers(folder: Path) -> None:
    before = rows_of(folder)
    scored = next(row for row in before if "eval/accuracy/T1" in row)
    predictions = (folder / "predictions.jsonl").read_text()
    metrics = evaluate_run(folder)
    assert {"step": 4, **metrics} == scored
    assert rows_of(folder) == [*before, scored]
    assert (folder / "predictions.jsonl").read_text() == predictions


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluation_of_other_manifests_writes_nothing(folder: Path, cohort: DemoCohort) -> None:
    before = files_of(folder)
    metrics = evaluate_run(folder, manifests=[cohort.train_manifest], controls=False, max_samples=3)
    assert metrics["eval/questions/T1"] == 3
    assert not any(key.startswith("eval/shuffled") for key in metrics)
    assert files_of(folder) == before


@pytest.mark.parametrize("asked", [{"max_samples": 1}, {"controls": False}])
def test_partial_evaluation_keeps_the_results_of_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture, asked: dict[str, Any]
) -> None:
    caplog.set_level("INFO")
    before = files_of(folder)
    assert "eval/accuracy/T1" in evaluate_run(folder, **asked)
    assert files_of(folder) == before
    assert "nothing was written" in caplog.text


def test_unfinished_run_cannot_be_evaluated(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    with pytest.raises(RunError, match="has no model"):
        evaluate_run(tmp_path)


def test_run_without_evaluation_manifests_names_the_option(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    changed = load_config(folder / "config.yaml", ["--data.evaluation", "[]"])
    (tmp_path / "config.yaml").write_text(dump_config(changed))
    with pytest.raises(RunError, match="no evaluation manifests; name one with --manifest"):
        evaluate_run(tmp_path)


def test_a_lexicon_that_cannot_be_read_is_rejected_before_training(config: RunConfig, tmp_path: Path) -> None:
    report = config.report.model_copy(update={"laterality_lexicon": tmp_path / "words.yaml"})
    with pytest.raises(RunError, match=r"words\.yaml"):
        train(config.model_copy(update={"output_dir": tmp_path, "report": report}))
    assert not (tmp_path / config.name).exists()


@pytest.mark.parametrize("is_dry", [False, True])
def test_too_few_evaluation_samples_are_rejected_before_training(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_dry: bool
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(cohort.test_manifest.read_text().splitlines()[0])
    config = make_config(
        tmp_path / "runs",
        data={"evaluation": [{"manifest": str(few), "data_root": str(cohort.directory)}]},
        trainer={"eval_steps": 2},
    )

    def build_arguments_of_two_ranks(*args: Any, **options: Any) -> Any:
        arguments = build_arguments(*args, **options)
        monkeypatch.setattr(type(arguments), "world_size", 2)
        return arguments

    monkeypatch.setattr(run, "build_arguments", build_arguments_of_two_ranks)
    with pytest.raises(RunError, match=r"data\.evaluation: 1 samples cannot give each of 2 ranks a batch"):
        train(config, dry_run=is_dry)
    assert not list(config.output_dir.glob("*"))


def test_run_records_its_cohort_and_is_evaluated_from_any_folder(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    config = make_config(
        Path("runs"),
        data={"train": [], "evaluation": [], "synthetic": {"num_train": 1, "num_test": 1}},
        trainer={"max_steps": 1},
    )
    folder = train(config)
    assert folder == tmp_path / "runs" / "run"
    saved = load_config(folder / "config.yaml")
    assert saved.output_dir == tmp_path / "runs"
    assert saved.data.synthetic is not None
    assert saved.data.synthetic.directory == tmp_path / "runs" / "synthetic-cohort"
    monkeypatch.chdir(elsewhere)
    assert load_config(folder / "config.yaml") == saved
    assert evaluate_run(folder)["eval/questions/T1"] == 1
    (tmp_path / "runs" / "synthetic-cohort").rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"cohort: the synthetic cohort .* --num-train 1 --num-test 1 --seed 0"):
        evaluate_run(folder)
    assert list(elsewhere.iterdir()) == []
    assert not (tmp_path / "runs" / "synthetic-cohort").exists()


@pytest.mark.parametrize("moment", ["step", "save", "manifest"])
def test_a_signal_at_the_end_of_the_training_stops_before_the_evaluation(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = make_config(
        tmp_path,
        trainer={"max_steps": 1, "use_cpu": True},
        report={"enabled": False, "pictures": False, "controls": False, "max_new_tokens": 1},
    )
    method = {"step": "training_step", "save": "_save_checkpoint"}.get(moment, "on_train_end")
    place = Checkpoints if moment == "manifest" else run.UmbrellaTrainer
    original = getattr(place, method)

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, method, signalled)
        with pytest.raises(RunStoppedError) as stopped:
            train(config)
    folder = tmp_path / "run"
    assert (stopped.value.step, stopped.value.signal_number) == (1, signal.SIGTERM)
    assert (folder / "REQUEUE").exists()
    assert not (folder / "model").exists()
    assert checkpoint_problems(folder / "checkpoint-1") == []
    assert train(config, resume="auto") == folder
    assert (folder / "FINISHED").exists()


def test_every_key_of_the_metrics_is_documented(folder: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    figures = "".join(
        readme.split(f"\n### {title}\n")[1].split("\n### ")[0] for title in ("Figures", "Scores of texts")
    )
    labels = set(re.findall(r"`(\w+)`", figures)) | {"loss"}
    found = {key for row in rows_of(folder) for key in row}
    assert len(found) > 50
    assert [key for key in sorted(found) if metric_key(key) is None] == []
    used = {key.split("/")[1] for key in found if key.startswith("eval/")}
    bases = {re.sub(r"(?<=.)_(shuffled|swapped|no_scan)$", "", re.sub(r"_(lower|upper)$", "", label)) for label in used}
    assert bases - labels == set()
