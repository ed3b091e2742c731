"""umbrella-eval RUN --against RUN2: pairs of subjects, folds, and what cannot be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from umbrella_data.privacy import pseudonyms
from umbrella_train import cli
from umbrella_train.errors import RunError
from umbrella_train.run.against import compare_runs
from umbrella_train.run_folder import write_lines


def sex_row(subject: str, *, hit: bool = True, answer: str = "female", **values: Any) -> dict[str, Any]:
    return {
        "subject": subject,
        "task": "sex",
        "modality": "T1",
        "condition": "accuracy",
        "question": "Which sex?",
        "type": "choice",
        "options": ["male", "female"],
        "answer": answer,
        "unit": None,
        "generated": answer if hit else "?",
        "score": float(hit),
        **values,
    }


def age_row(subject: str, age: float, text: str, *, score: float | None) -> dict[str, Any]:
    return sex_row(subject) | {
        "task": "age", "type": "number", "options": [], "answer": age, "unit": "years", "generated": text,
        "score": score,
    }  # fmt: skip


def write_run(folder: Path, rows: Sequence[dict[str, Any]], *, salted: Path | None = None) -> Path:
    """A run's predictions, and a salt and table of names of its own."""
    name_hash = pseudonyms(salted or folder)
    write_lines(folder / "predictions.jsonl", [row | {"subject": name_hash(row["subject"])} for row in rows])
    return folder


def hits(*, right: int, of: int = 10) -> list[dict[str, Any]]:
    return [sex_row(f"sub-{number:02}", hit=number < right) for number in range(of)]


def test_subjects_are_paired_by_name(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", hits(right=9))
    second = write_run(tmp_path / "b", [*reversed(hits(right=4)), sex_row("sub-99")])
    (comparison,) = compare_runs(first, second)
    accuracy = comparison.differences["accuracy"]
    assert comparison.name == "T1/sex"
    assert (comparison.num_subjects, comparison.only_in_one, comparison.left_out) == (10, 1, 0)
    assert accuracy.values == (0.9, 0.4)
    assert accuracy.figure.value == pytest.approx(0.5)
    # The same five subjects differ: 2 of 32 exchanges of them are as far apart.
    assert accuracy.p == pytest.approx(2 / 32)


def test_rows_are_paired_by_answers_with_names_whose_hashes_differ(tmp_path: Path) -> None:
    folders = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        name_hash = pseudonyms(folder)
        text = f"report of {name_hash('sub-1')}"
        folders.append(write_run(folder, [sex_row("sub-1", answer=text, type="text", options=[])]))
    (comparison,) = compare_runs(*folders)
    assert (comparison.num_subjects, comparison.left_out) == (1, 0)
    assert comparison.differences["token_f1"].values == (1, 1)


def test_names_with_and_without_prefix_are_one_subject(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", hits(right=9))
    second = write_run(tmp_path / "b", [row | {"subject": row["subject"][4:]} for row in hits(right=4)])
    assert compare_runs(first, second)[0].num_subjects == 10


def test_only_own_scans_and_common_tasks_are_compared(tmp_path: Path) -> None:
    controls = [sex_row(f"sub-{number:02}", hit=False, condition="shuffled") for number in range(10)]
    others = [sex_row(f"sub-{number:02}", task="side") for number in range(10)]
    first = write_run(tmp_path / "a", [*hits(right=10), *controls, *others])
    second = write_run(tmp_path / "b", [*hits(right=10), *controls])
    (comparison,) = compare_runs(first, second)
    assert comparison.differences["accuracy"].values == (1, 1)


def test_rows_of_a_subject_are_paired_by_their_right_answer(tmp_path: Path) -> None:
    rows = [age_row("sub-1", 30, "31", score=1), age_row("sub-1", 40, "42", score=2)]
    third, second_subject = age_row("sub-2", 50, "53", score=3), age_row("sub-3", 60, "66", score=6)
    unread = age_row("sub-4", 70, "old", score=None)
    relabelled = age_row("sub-3", 61, "66", score=5)
    first = write_run(tmp_path / "a", [*rows, third, second_subject, age_row("sub-4", 70, "70", score=0)])
    second = write_run(tmp_path / "b", [*reversed(rows), third, relabelled, unread])
    (comparison,) = compare_runs(first, second)
    # sub-3 has another right answer, sub-4 no number.
    assert (comparison.num_subjects, comparison.left_out) == (2, 2)
    assert comparison.differences["error"].values == (2, 2)
    assert comparison.differences["error"].p == 1


def test_a_subject_with_other_rows_is_left_out(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", hits(right=9))
    second = write_run(tmp_path / "b", [*hits(right=9), sex_row("sub-00")])
    (comparison,) = compare_runs(first, second)
    assert (comparison.num_subjects, comparison.left_out) == (9, 2)


def test_folders_of_folds_are_pooled(tmp_path: Path) -> None:
    for fold in (0, 1):
        write_run(tmp_path / "folds" / f"fold-{fold + 1}", hits(right=9)[fold::2])
    single = write_run(tmp_path / "single", hits(right=4))
    (comparison,) = compare_runs(tmp_path / "folds", single)
    assert comparison.differences["accuracy"].values == (0.9, 0.4)
    # Pooled predictions of the folder itself come first, with its own names or those of its folds.
    write_lines(
        tmp_path / "folds" / "predictions.jsonl",
        [json.loads(line) for line in (tmp_path / "folds" / "fold-1" / "predictions.jsonl").read_text().splitlines()],
    )
    (comparison,) = compare_runs(tmp_path / "folds", single)
    assert (comparison.num_subjects, comparison.only_in_one, comparison.left_out) == (5, 5, 0)


@pytest.mark.parametrize("missing", ["predictions.jsonl", "names.jsonl", "a name", "a key", "a line"])
def test_what_a_run_lacks_is_named(tmp_path: Path, missing: str) -> None:
    first, second = write_run(tmp_path / "a", hits(right=9)), write_run(tmp_path / "b", hits(right=9))
    table, predictions = second / "names.jsonl", second / "predictions.jsonl"
    if missing == "a name":
        table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    elif missing == "a key":
        predictions.write_text(predictions.read_text().replace('"condition"', '"kind"', 1))
    elif missing == "a line":
        predictions.write_text(predictions.read_text()[:-20])
    else:
        (second / missing).unlink()
    with pytest.raises(RunError, match=f"umbrella-eval {second}") as caught:
        compare_runs(first, second)
    named = {"a name": "names.jsonl", "a key": "predictions.jsonl", "a line": "predictions.jsonl"}
    assert named.get(missing, missing) in str(caught.value)
    assert "sub-0" not in str(caught.value)


def test_runs_with_nothing_in_common_are_rejected(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", hits(right=9))
    for rows in ([sex_row("sub-99")], [row | {"task": "side"} for row in hits(right=9)]):
        with pytest.raises(RunError, match="in common"):
            compare_runs(first, write_run(tmp_path / "b", rows))


def test_the_command_prints_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "a", hits(right=9)), write_run(tmp_path / "b", hits(right=4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cli.eval_command([str(first), "--against", str(second), "--json"])
    metrics = json.loads(capsys.readouterr().out)
    ends = ("", "_lower", "_upper", "_p", "_first", "_second")
    labels = [f"accuracy{end}" for end in ends] + ["subjects", "only_in_one", "left_out"]
    assert list(metrics) == [f"against/{label}/T1/sex" for label in labels]
    assert metrics["against/accuracy/T1/sex"] == pytest.approx(0.5)
    assert metrics["against/accuracy_p/T1/sex"] == pytest.approx(2 / 32)
    assert 0 < metrics["against/accuracy_lower/T1/sex"] < 0.5 < metrics["against/accuracy_upper/T1/sex"] < 1
    cli.eval_command([str(first), "--against", str(second)])
    heading, line, *_ = capsys.readouterr().out.splitlines()
    assert str(first) in heading
    assert line.split()[:5] == ["T1/sex", "accuracy", "0.9", "0.4", "+0.5"]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_interval_that_does_not_exist_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_run(tmp_path / name, [sex_row("sub-1")]) for name in "ab")
    cli.eval_command([str(first), "--against", str(second), "--json"])
    assert json.loads(capsys.readouterr().out)["against/accuracy_lower/T1/sex"] is None
    cli.eval_command([str(first), "--against", str(second)])
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--manifest", "a.jsonl"], ["--no-controls"], ["--max-samples", "1"]])
def test_options_of_an_evaluation_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.eval_command([str(tmp_path), "--against", str(tmp_path), *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_comparison_does_not_import_torch() -> None:
    code = "import umbrella_train.run.against, sys; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
