"""Answers of a trained model for every row of a manifest: `umbrella-eval --out`, `umbrella-predict --manifest`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from umbrella_data import ScanError
from umbrella_data.manifest.sample import Scan
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train import cli
from umbrella_train.assembly.answer_manifests import answer_manifests
from umbrella_train.assembly.predict import predict
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run import evaluation
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.training import train

MakeConfig = Callable[..., RunConfig]
Rows = list[dict[str, Any]]
NUM_TOKENS = 4


@pytest.fixture(scope="module")
def folder(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    report = {"enabled": False, "pictures": False, "controls": False, "max_new_tokens": NUM_TOKENS}
    path = train(make_config(tmp_path_factory.mktemp("runs"), trainer={"max_steps": 1}, report=report))
    assert path is not None
    return path


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ends_with_user(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "messages": row["messages"][:-1]}


def without_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "answer"}


@pytest.fixture
def mixed(cohort: DemoCohort, tmp_path: Path) -> Path:
    """Rows with and without an answer and an assistant's turn, one of them with two exchanges."""
    rows = [*rows_of(cohort.test_manifest), *rows_of(cohort.train_manifest)[:3]]
    rows[1] = without_answer(rows[1])
    rows[2] = without_answer(ends_with_user(rows[2]))
    rows[3] = ends_with_user(rows[3])
    rows[4] = without_answer({**rows[4], "messages": [*rows[4]["messages"], rows[0]["messages"][0]]})
    return write(tmp_path / "mixed.jsonl", [rows[index] for index in (4, 0, 1, 2, 3, 5)] + rows[6:])


def options(cohort: DemoCohort, manifest: Path) -> dict[str, Any]:
    return {"manifests": [manifest], "data_root": cohort.directory}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_eval_writes_an_answer_for_each_row_and_scores_those_with_an_answer(
    folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path
) -> None:
    before = files_of(folder)
    out = tmp_path / "new" / "answers.jsonl"
    metrics = evaluate_run(folder, **options(cohort, mixed), out=out)
    asked, answers = rows_of(mixed), rows_of(out)
    assert [row["id"] for row in answers] == [row["id"] for row in asked]
    for row, given in zip(asked, answers, strict=True):
        assert (given["subject"], given["task"]) == (row["subject"], row["task"])
        assert isinstance(given["generated"], str)
        right = row.get("answer", {})
        assert (given["type"], given["answer"], given["options"]) == tuple(
            right.get(key) for key in ("type", "value", "options")
        )
        assert (given["score"] is None) == (given["is_parsed"] is None) == (not right)
    assert metrics["eval/questions/T1"] + metrics["eval/questions/dMRI"] + metrics["eval/questions/rsfMRI"] == 6
    assert files_of(folder) == before


def test_a_run_of_an_earlier_version_has_the_possible_answers_of_its_training_data(
    folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    (older / "answers.json").unlink()
    before, asked = files_of(older), []
    find = evaluation.find_answer_spaces
    monkeypatch.setattr(
        evaluation, "find_answer_spaces", lambda train, **keys: asked.extend(train) or find(train, **keys)
    )
    for run in (folder, older):
        evaluate_run(run, **options(cohort, mixed), out=tmp_path / f"{run.name}.jsonl")
    assert rows_of(tmp_path / "older.jsonl") == rows_of(tmp_path / f"{folder.name}.jsonl")
    assert [source.manifest for source in asked] == [cohort.train_manifest]
    assert files_of(older) == before


def test_answers_are_those_to_the_same_questions_asked_alone(
    folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path
) -> None:
    evaluate_run(folder, **options(cohort, mixed), out=tmp_path / "answers.jsonl")
    scored = {row["id"]: row["generated"] for row in rows_of(tmp_path / "answers.jsonl")}
    arguments: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "device": "cpu"}
    plain = list(answer_manifests(folder / "model", [mixed], data_root=cohort.directory, batch_size=3, **arguments))
    assert list(plain[0]) == ["id", "subject", "task", "modality", "question", "generated"]
    assert [row["id"] for row in plain] == [row["id"] for row in rows_of(mixed)]
    assert {row["id"]: row["generated"] for row in plain} == scored
    for row in rows_of(mixed):
        if len(row["messages"]) <= 2:
            scan, question = row["messages"][0]["content"]
            scans = [Scan(scan["modality"], (cohort.directory / scan["path"],))]
            assert predict(folder, question=question["text"], scans=scans, **arguments) == scored[row["id"]]


def test_scores_do_not_depend_on_rows_without_an_answer(
    folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path
) -> None:
    manifest = write(tmp_path / "all.jsonl", [*rows_of(mixed)[:6], *rows_of(cohort.train_manifest)])
    plain = evaluate_run(folder, **options(cohort, manifest), controls=True)
    assert any(key.startswith("eval/shuffled/") for key in plain)
    assert evaluate_run(folder, **options(cohort, manifest), controls=True, out=tmp_path / "a.jsonl") == plain


def test_max_samples_limits_the_answers(folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path) -> None:
    evaluate_run(folder, **options(cohort, mixed), max_samples=1, out=tmp_path / "answers.jsonl")
    answers = rows_of(tmp_path / "answers.jsonl")
    assert sorted(row["modality"] for row in answers) == ["T1", "T1+rsfMRI", "dMRI", "rsfMRI"]
    assert [row["score"] is None for row in answers if "+" not in row["modality"]] == [False] * 3


def test_run_adds_its_scores_to_its_files_and_writes_the_answers(
    folder: Path, cohort: DemoCohort, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "run")
    metrics = evaluate_run(own, out=tmp_path / "answers.jsonl")
    assert [row["id"] for row in rows_of(tmp_path / "answers.jsonl")] == [
        row["id"] for row in rows_of(cohort.test_manifest)
    ]
    assert rows_of(own / "metrics.jsonl")[-1] == {"step": 1, **metrics}
    assert "id" not in rows_of(own / "predictions.jsonl")[0]


def test_nothing_to_score_is_an_error_without_a_file_for_the_answers(
    folder: Path, cohort: DemoCohort, tmp_path: Path
) -> None:
    rows = rows_of(cohort.test_manifest)
    manifest = write(tmp_path / "asked.jsonl", [without_answer(ends_with_user(row)) for row in rows])
    with pytest.raises(RunError, match="--out"):
        evaluate_run(folder, **options(cohort, manifest))
    assert evaluate_run(folder, **options(cohort, manifest), out=tmp_path / "answers.jsonl") == {}
    assert len(rows_of(tmp_path / "answers.jsonl")) == len(rows)


@pytest.mark.parametrize("command", [cli.eval_command, cli.predict_command])
def test_a_manifest_without_rows_ends_with_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None]
) -> None:
    out = tmp_path / "answers.jsonl"
    for manifest in (write(tmp_path / "empty.jsonl", []), tmp_path / "missing.jsonl"):
        with pytest.raises(SystemExit) as caught:
            command([str(folder), "--manifest", str(manifest), "--out", str(out)])
        assert caught.value.code == 2
        assert str(manifest) in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", [cli.eval_command, cli.predict_command])
def test_a_file_that_cannot_be_written_is_rejected_first(
    folder: Path,
    cohort: DemoCohort,
    mixed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], None],
) -> None:
    before = mixed.read_bytes()
    for out in (mixed, tmp_path, mixed / "answers.jsonl"):
        with pytest.raises(SystemExit) as caught:
            command([str(folder), "--manifest", str(mixed), "--data-root", str(cohort.directory), "--out", str(out)])
        assert caught.value.code == 2
        assert str(out) in capsys.readouterr().err
    assert mixed.read_bytes() == before


def test_predict_prints_the_rows_or_writes_them(
    folder: Path, cohort: DemoCohort, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--manifest", str(mixed), "--data-root", str(cohort.directory), "--use-cpu"]
    words += ["--max-new-tokens", "2", "--batch-size", "2"]
    cli.predict_command(words)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (tmp_path / "answers.jsonl").write_text("replaced\n")
    cli.predict_command([*words, "--out", str(tmp_path / "answers.jsonl")])
    assert rows_of(tmp_path / "answers.jsonl") == printed
    assert [row["id"] for row in printed] == [row["id"] for row in rows_of(mixed)]


def test_predict_reports_all_problems_of_all_manifests_before_it_answers(
    make_config: MakeConfig, folder: Path, cohort: DemoCohort, tmp_path: Path
) -> None:
    rows = rows_of(cohort.test_manifest)
    rows[1]["messages"][0]["content"][0]["path"] = "nowhere.nii.gz"
    rows[2]["messages"] = rows[2]["messages"][1:]
    broken = write(tmp_path / "broken.jsonl", rows)
    model = shutil.copytree(folder / "model", tmp_path / "model")
    settings = json.loads((model / "processor_config.json").read_text())
    settings["modality_order"].remove("dMRI")
    (model / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(RunError) as caught:
        answer_manifests(model, [broken, cohort.test_manifest], data_root=cohort.directory, device="cpu")
    for words in ("line 2", "nowhere.nii.gz", "line 3", f"{cohort.test_manifest}: has dMRI"):
        assert words in str(caught.value)


def test_answers_that_stop_at_a_damaged_scan_leave_the_earlier_file(
    folder: Path, cohort: DemoCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(cohort.directory, tmp_path / "cohort")
    scan = own / rows_of(own / "test.jsonl")[-1]["messages"][0]["content"][0]["path"]
    scan.write_bytes(scan.read_bytes()[:-4])
    out = tmp_path / "answers.jsonl"
    out.write_text("earlier\n")
    with pytest.raises(SystemExit) as caught:
        cli.predict_command([str(folder), "--manifest", str(own / "test.jsonl"), "--out", str(out)])
    assert caught.value.code == 2
    assert scan.name in capsys.readouterr().err
    assert out.read_text() == "earlier\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "cohort"]
    with pytest.raises(ScanError):
        evaluate_run(folder, manifests=[own / "test.jsonl"], out=out)
    assert out.read_text() == "earlier\n"


def test_skipped_samples_have_a_row_without_text(folder: Path, cohort: DemoCohort, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("on_bad_scan: raise", "on_bad_scan: skip")
    (run / "config.yaml").write_text(config.replace("max_bad_fraction: 0.01", "max_bad_fraction: 0.5"))
    own = shutil.copytree(cohort.directory, tmp_path / "cohort")
    rows = rows_of(own / "test.jsonl")
    scan = own / rows[0]["messages"][0]["content"][0]["path"]
    scan.write_bytes(b"damaged")
    metrics = evaluate_run(run, manifests=[own / "test.jsonl"], out=tmp_path / "answers.jsonl")
    answers = rows_of(tmp_path / "answers.jsonl")
    assert [row["generated"] is None for row in answers] == [True] + [False] * (len(rows) - 1)
    assert (answers[0]["score"], answers[0]["is_parsed"]) == (None, None)
    assert metrics["eval/questions/T1"] == 1


@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_rows_that_end_with_the_user_cannot_be_trained_or_evaluated_on_in_a_run(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path, part: str
) -> None:
    manifest = write(tmp_path / "asked.jsonl", [ends_with_user(row) for row in rows_of(cohort.test_manifest)])
    source = {"manifest": str(manifest), "data_root": str(cohort.directory)}
    with pytest.raises(RunError, match=r"line 1: roles are user"):
        train(make_config(tmp_path / "runs", data={part: [source]}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [cli.eval_command, cli.predict_command])
def test_a_question_with_markup_is_one_message(
    folder: Path,
    cohort: DemoCohort,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], None],
) -> None:
    row = rows_of(cohort.test_manifest)[0]
    row["messages"][0]["content"][1]["text"] = "Is <|image|> a scan?"
    manifest = write(tmp_path / "markup.jsonl", [row])
    with pytest.raises(SystemExit) as caught:
        command([str(folder), "--manifest", str(manifest), "--data-root", str(cohort.directory)])
    assert caught.value.code == 2
    assert "line 1" in capsys.readouterr().err


def test_evaluation_data_that_are_in_the_training_data_are_named_and_recorded(
    folder: Path, cohort: DemoCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    # As if the manifest had been changed after the run.
    config = yaml.safe_load((copy / "config.yaml").read_text())
    sources = [{"manifest": str(cohort.train_manifest), "data_root": str(cohort.directory)}]
    config["data"] |= {"synthetic": None, "train": sources, "evaluation": sources}
    (copy / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    num_subjects = len({row["subject"] for row in rows_of(cohort.train_manifest)})
    evaluate_run(copy, max_samples=1)
    assert any("in common" in record.getMessage() for record in caplog.records)
    assert not any("overlap/subjects" in row for row in rows_of(copy / "metrics.jsonl"))
    evaluate_run(copy)
    overlaps = [row["overlap/subjects"] for row in rows_of(copy / "metrics.jsonl") if "overlap/subjects" in row]
    assert overlaps == [num_subjects]
