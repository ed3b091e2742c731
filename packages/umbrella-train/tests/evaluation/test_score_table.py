"""The table of scores that the commands print."""

from __future__ import annotations

import pytest

from umbrella_data.manifest.sample import Answer
from umbrella_train.evaluation.comparison import baseline_metrics, better_baselines, has_overlap
from umbrella_train.evaluation.metrics import summarise
from umbrella_train.evaluation.predictions import Condition, Prediction, Reply, read_reply
from umbrella_train.evaluation.score_table import score_cell, score_table

SEX = Answer(type="choice", value="female", options=("female", "male"))
AGE = Answer(type="number", value=63.0, unit="years")


def predictions_of(
    task: str, answer: Answer, said: dict[Condition, list[str]], modality: str = "T1"
) -> list[Prediction]:
    """Generated texts by condition, one for each subject."""
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
            **read_reply(Reply(text), answer),
        )
        for condition, texts in said.items()
        for number, text in enumerate(texts)
    ]


def test_a_baseline_belongs_to_the_task_of_its_whole_name() -> None:
    found = {"baseline/volume/accuracy/T1/T1/sex": 0.5, "baseline/volume/accuracy/T1/sex": 0.75}
    assert baseline_metrics(found, "T1/sex") == {"volume": {"eval/accuracy/T1/sex": 0.75}}
    assert baseline_metrics(found, "T1/T1/sex") == {"volume": {"eval/accuracy/T1/T1/sex": 0.5}}


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23"), (30567.4, "30567"), (999.7, "1000"), (0.00012, "0.00012")]
)
def test_large_errors_have_no_exponent(value: float, text: str) -> None:
    assert score_cell({"eval/error/T1/volume": value}, "error", "T1/volume").value == text


def test_texts_of_a_run_of_an_earlier_version_are_in_the_table() -> None:
    older = {"eval/accuracy/T1/finding": 0.5, "eval/no_scan/T1/finding": 0.25, "eval/subjects/T1/finding": 8.0}
    assert rows_of(score_table(older)) == {"T1/finding": ["50.0 % (no interval)", "25.0 %", "8"]}


@pytest.fixture(scope="module")
def metrics() -> dict[str, float]:
    predictions = [
        *predictions_of("sex", SEX, {"accuracy": ["female"] * 3 + ["male"], "no_scan": ["female"] * 2 + ["male"] * 2}),
        *predictions_of("age", AGE, {"accuracy": ["65", "67", "?", "60"], "shuffled": ["71"] * 4}),
        *predictions_of("side", SEX, {"accuracy": ["male", "?"]}, modality="dMRI"),
        *predictions_of("sex", SEX, {"accuracy": ["female"] * 2}, modality="dMRI"),
        *predictions_of("age", AGE, {"accuracy": ["?"]}, modality="dMRI"),
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
    # Its interval contains the control's.
    assert rows["T1/sex"] == ["75.0 %* (30 to 95)", "50.0 %", "50.0 %", "100.0 %", "0.0 %", "4"]
    assert hits.splitlines()[-1].startswith("* ")
    assert rows["dMRI/side"][0].startswith("0.0 % (")
    assert rows["dMRI/side"][1:] == ["–", "50.0 %", "100.0 %", "50.0 %", "2"]


def test_tasks_have_no_total(metrics: dict[str, float]) -> None:
    hits, _ = score_table(metrics).split("\n\n")
    assert list(rows_of(hits)) == ["T1/sex", "dMRI/sex", "dMRI/side"]


def test_errors_have_a_table_also_without_readable_answers(metrics: dict[str, float]) -> None:
    _, errors = score_table(metrics).split("\n\n")
    rows = rows_of(errors)
    words = "mean error own scan as text another's scan best constant guess unreadable subjects"
    assert sorted(errors[: errors.index("T1/age")].split()) == sorted(words.split())
    assert rows["T1/age"] == [rows["T1/age"][0], "3", "8", "0", "25.0 %", "4"]
    assert rows["T1/age"][0].startswith("3 (")
    assert rows["dMRI/age"] == ["–", "–", "–", "0", "100.0 %", "1"]


def test_a_task_with_hits_and_errors_is_in_both_tables() -> None:
    own = [
        *predictions_of("age", AGE, {"accuracy": ["65", "67"]}),
        *predictions_of("age", SEX, {"accuracy": ["female", "male"]}),
        *predictions_of("age/left", SEX, {"accuracy": ["female"]}),
    ]
    hits, errors = score_table(summarise(own)).split("\n\n")
    assert {"T1/age", "T1/age/left"} <= rows_of(hits).keys()
    assert rows_of(errors)["T1/age"][0].startswith("3 (")


def test_baselines_are_below_their_task_and_named_where_they_are_better(metrics: dict[str, float]) -> None:
    baseline = {
        "baseline/volume/accuracy/T1/sex": 0.9,
        "baseline/volume/accuracy_lower/T1/sex": 0.8,
        "baseline/volume/accuracy_upper/T1/sex": 0.95,
        "baseline/constant/error/T1/age": 5.0,
        "baseline/constant/error_lower/T1/age": 4.5,
        "baseline/constant/error_upper/T1/age": 5.5,
    }
    hits, errors = score_table({**metrics, **baseline}).split("\n\n")
    lines = hits.splitlines()
    below = next(position for position, line in enumerate(lines) if line.startswith("T1/sex")) + 1
    assert lines[below].split()[:2] == ["volume", "90.0"]
    assert [line for line in lines if line.startswith("T1/sex: ") and "volume 0.9" in line]
    assert "volume" not in errors
    assert not [line for line in errors.splitlines() if line.startswith("T1/age: ")]
    assert better_baselines({**metrics, **baseline}, "T1/age") == []


@pytest.mark.parametrize(
    ("own", "other", "is_marked"),
    [((0.8, 0.9), (0.4, 0.6), False), ((0.6, 0.9), (0.4, 0.6), True), ((0.1, 0.2), (0.4, 0.6), True)],
)
@pytest.mark.parametrize("other_key", ["eval/auroc_shuffled{}/T1/sex", "baseline/cnn/auroc{}/T1/sex"])
def test_a_figure_is_marked_unless_its_interval_is_better(
    own: tuple[float, float], other: tuple[float, float], is_marked: bool, other_key: str
) -> None:
    found = {"eval/auroc/T1/sex": sum(own) / 2, other_key.format(""): sum(other) / 2}
    for side, mine, others in zip(("lower", "upper"), own, other, strict=True):
        found |= {f"eval/auroc_{side}/T1/sex": mine, other_key.format(f"_{side}"): others}
    assert has_overlap(found, "auroc", "T1/sex") == is_marked
    assert score_cell(found, "auroc", "T1/sex").value.endswith("*") == is_marked


def test_a_smaller_error_is_better() -> None:
    found = {"eval/error/T1/age": 5.0, "eval/error_lower/T1/age": 4.0, "eval/error_upper/T1/age": 6.0}
    control = {"eval/error_no_scan/T1/age": 9.0, "eval/error_no_scan_lower/T1/age": 7.0,
               "eval/error_no_scan_upper/T1/age": 11.0}  # fmt: skip
    assert not has_overlap(found | control, "error", "T1/age")
    assert has_overlap(found | control | {"eval/error_no_scan_lower/T1/age": 5.5}, "error", "T1/age")


def test_without_unreadable_answers_there_is_no_column_for_them() -> None:
    table = score_table(summarise(predictions_of("sex", SEX, {"accuracy": ["female", "male"]})))
    assert "unreadable" not in table
    assert rows_of(table)["T1/sex"][1:] == ["50.0 %", "100.0 %", "2"]


def test_columns_are_aligned(metrics: dict[str, float]) -> None:
    for table in score_table(metrics).split("\n\n"):
        assert len({len(line) for line in table.splitlines() if not line.startswith("* ")}) == 1


def test_without_scores_there_is_no_table() -> None:
    assert score_table({}) == ""
