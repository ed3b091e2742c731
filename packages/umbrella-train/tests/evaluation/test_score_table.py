"""The table of scores that the commands print."""

from __future__ import annotations

import pytest

from umbrella_data.manifest.sample import Answer
from umbrella_train.evaluation.metrics import CONDITIONS, Prediction, summarise
from umbrella_train.evaluation.score_table import score_table

SEX = Answer(type="choice", value="female", options=("female", "male"))
AGE = Answer(type="number", value=63.0, unit="years")


def predictions_of(
    task: str, answer: Answer, scores: dict[str, list[float | None]], modality: str = "T1"
) -> list[Prediction]:
    return [
        Prediction(
            subject=f"{number}",
            task=task,
            modality=modality,
            condition=condition,
            question="?",
            type=answer.type,
            options=answer.options,
            answer=answer.value,
            unit=answer.unit,
            generated="",
            score=score,
            is_parsed=score is not None,
        )
        for condition in CONDITIONS
        for number, score in enumerate(scores.get(condition, []))
    ]


@pytest.fixture(scope="module")
def metrics() -> dict[str, float]:
    predictions = [
        *predictions_of("sex", SEX, {"accuracy": [1, 1, 1, 0], "no_scan": [1, 1, 0, 0]}),
        *predictions_of("age", AGE, {"accuracy": [2.0, 4.0, None, 3.0], "shuffled": [8.0, 8.0, 8.0, 8.0]}),
        *predictions_of("side", SEX, {"accuracy": [0, None]}, modality="dMRI"),
        *predictions_of("sex", SEX, {"accuracy": [1, 1]}, modality="dMRI"),
        *predictions_of("age", AGE, {"accuracy": [None]}, modality="dMRI"),
    ]
    return summarise(predictions)


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of each row, split at two or more blanks, without headings."""
    lines = table.splitlines()
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in rows if "/" in row[0] or row[0] in ("T1", "dMRI")}


def test_accuracies_are_next_to_guessing_and_the_commonest_answer(metrics: dict[str, float]) -> None:
    hits, _ = score_table(metrics).split("\n\n")
    rows = rows_of(hits)
    words = "right answers own scan no scan guessing commonest answer unreadable subjects"
    assert sorted(hits[: hits.index("T1/sex")].split()) == sorted(words.split())
    assert rows["T1/sex"] == ["75.0 % (30 to 95)", "50.0 %", "50.0 %", "100.0 %", "0.0 %", "4"]
    assert rows["dMRI/side"][0].startswith("0.0 % (")
    assert rows["dMRI/side"][1:] == ["–", "50.0 %", "100.0 %", "50.0 %", "2"]


def test_a_modality_with_several_tasks_has_a_total(metrics: dict[str, float]) -> None:
    hits, _ = score_table(metrics).split("\n\n")
    assert list(rows_of(hits)) == ["T1/sex", "dMRI", "dMRI/sex", "dMRI/side"]
    assert rows_of(hits)["dMRI"][0].startswith("50.0 % (")


def test_errors_have_a_table_also_without_readable_answers(metrics: dict[str, float]) -> None:
    _, errors = score_table(metrics).split("\n\n")
    rows = rows_of(errors)
    words = "mean error own scan another's scan best constant guess unreadable subjects"
    assert sorted(errors[: errors.index("T1/age")].split()) == sorted(words.split())
    assert rows["T1/age"] == [f"3 ({rows['T1/age'][0][3:-1]})", "8", "0", "25.0 %", "4"]
    assert rows["dMRI/age"] == ["–", "–", "0", "100.0 %", "1"]


def test_a_task_with_hits_and_errors_is_in_both_tables() -> None:
    own = [*predictions_of("age", AGE, {"accuracy": [2.0, 4.0]}), *predictions_of("age", SEX, {"accuracy": [1, 0]})]
    hits, errors = score_table(summarise([*own, *predictions_of("age/left", SEX, {"accuracy": [1]})])).split("\n\n")
    assert {"T1/age", "T1/age/left"} <= rows_of(hits).keys()
    assert rows_of(errors)["T1/age"][0].startswith("3 (")


def test_without_unreadable_answers_there_is_no_column_for_them() -> None:
    table = score_table(summarise(predictions_of("sex", SEX, {"accuracy": [1, 0]})))
    assert "unreadable" not in table
    assert rows_of(table)["T1/sex"][1:] == ["50.0 %", "100.0 %", "2"]


def test_columns_are_aligned(metrics: dict[str, float]) -> None:
    for table in score_table(metrics).split("\n\n"):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_without_scores_there_is_no_table() -> None:
    assert score_table({}) == ""
