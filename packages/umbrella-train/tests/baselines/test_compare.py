"""Baselines of planted questions: what they find, what they do not, and that nothing leaks from the test rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from umbrella_data.manifest.sample import Answer
from umbrella_train.baselines import compare, models
from umbrella_train.baselines.compare import BASELINES, predict_baselines, summarise_baselines
from umbrella_train.baselines.features import VolumeFile
from umbrella_train.baselines.rows import Row
from umbrella_train.evaluation.predictions import Prediction

MakeRow = Callable[..., Row]
Side = Callable[[int], Answer]
NUM_TRAIN, NUM_ALL = 40, 100


@pytest.fixture
def predict(volumes: VolumeFile, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[Prediction]]]:
    """`predict_baselines` with three penalties, and a CNN that is not trained for long."""
    monkeypatch.setattr(models, "PENALTIES", (1.0, 100.0, 1e4))
    cnn = compare.predict_cnn
    monkeypatch.setattr(compare, "predict_cnn", lambda *data, **options: cnn(*data, **options, num_epochs=1))

    def run(train: Sequence[Row], test: Sequence[Row], **options: Any) -> dict[str, list[Prediction]]:
        return predict_baselines(train, test, volumes=volumes, subject_hash=str.upper, **options)

    return run


def coin(seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, size=NUM_ALL).tolist()


def accuracy(predictions: Sequence[Prediction]) -> float:
    return float(np.mean([each.score for each in predictions]))


def test_names_in_questions_are_hidden(predict: Any, make_row: MakeRow, side: Side) -> None:
    rows = [make_row(n, side(n % 2), question=f"Where is sub-{n:03}?") for n in range(20)]
    found = predict(rows[:12], rows[12:])
    assert [each.question for each in found["constant"]] == [f"Where is SUB-{n:03}?" for n in range(12, 20)]


def test_a_planted_signal_is_found_in_the_volume_and_a_coin_is_not(predict: Any, make_row: MakeRow, side: Side) -> None:
    sides, coins = coin(), coin(1)
    rows = [make_row(n, side(sides[n]), signal=sides[n]) for n in range(NUM_ALL)]
    rows += [make_row(n, side(coins[n]), signal=sides[n], task="coin") for n in range(NUM_ALL)]
    train = [row for row in rows if row.sample.subject < f"sub-{NUM_TRAIN:03}"]
    found = predict(train, [row for row in rows if row not in train])
    assert list(found) == ["constant", "text", "volume", "histogram", "cnn"]
    by_task = {task: [p for p in found["volume"] if p.task == task] for task in ("task", "coin")}
    assert accuracy(by_task["task"]) > 0.9
    assert 0.3 < accuracy(by_task["coin"]) < 0.7
    for own in found.values():
        assert len(own) == 2 * (NUM_ALL - NUM_TRAIN)


def test_histogram_finds_brightness_and_numbers_are_in_their_unit(predict: Any, make_row: MakeRow) -> None:
    values = np.random.default_rng(0).uniform(0, 4, NUM_ALL).tolist()
    rows = [make_row(n, Answer("number", 100 + value, unit="mm"), signal=value) for n, value in enumerate(values)]
    found = predict(rows[:NUM_TRAIN], rows[NUM_TRAIN:])
    assert accuracy(found["constant"]) > 0.8
    for name in ("volume", "histogram"):
        assert accuracy(found[name]) < 0.35
    median = float(np.median(values[:NUM_TRAIN])) + 100
    assert {each.expected for each in found["constant"]} == {median}
    first = found["volume"][0]
    assert first.expected is not None
    assert first.score == abs(first.expected - (100 + values[NUM_TRAIN]))
    assert float(first.predicted) == pytest.approx(first.expected, rel=1e-5)
    assert (first.unit, first.option_scores, first.is_parsed) == ("mm", None, None)


def test_text_finds_a_label_in_the_question_and_never_sees_the_answer(
    predict: Any, make_row: MakeRow, side: Side
) -> None:
    sides = coin()
    hints = [make_row(n, side(sides[n]), question=f"After {'abx'[sides[n]]} drug, which?") for n in range(60)]
    assert accuracy(predict(hints[:40], hints[40:])["text"]) == 1
    plain = [make_row(n, side(sides[n])) for n in range(60)]
    found = predict(plain[:40], plain[40:])
    assert len({each.option_scores for each in found["text"]}) == 1  # no differences between the prompts


def test_a_test_label_changes_no_prediction(predict: Any, make_row: MakeRow, side: Side) -> None:
    sides = coin()
    regions = [{1: float(n), 2: 5.0} for n in range(30)]
    rows = [make_row(n, side(sides[n]), signal=sides[n], regions=regions[n]) for n in range(30)]
    before = predict(rows[:20], rows[20:], with_regions=True)
    assert tuple(before) == BASELINES
    changed = [replace(row, answer=side(1 - sides[20 + place])) for place, row in enumerate(rows[20:])]
    after = predict(rows[:20], changed, with_regions=True)
    for name in BASELINES:
        assert [each.option_scores for each in before[name]] == [each.option_scores for each in after[name]]
        assert [each.score for each in before[name]] == [1 - each.score for each in after[name]]
    # Nor does another test row.
    alone = predict(rows[:20], rows[20:21], with_regions=True)
    for name in BASELINES:
        assert alone[name][0].option_scores == pytest.approx(before[name][0].option_scores)


def test_region_volumes_are_used_where_all_scans_have_them(
    predict: Any, make_row: MakeRow, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.random.default_rng(0).uniform(0, 4, 60).tolist()
    # A label that only some scans have is a volume of 0 in the others; one that training lacks is ignored.
    regions = [
        {7: value, **({8: 2.0} if n % 2 else {}), **({9: 1e9} if n == 55 else {})} for n, value in enumerate(values)
    ]
    rows = [make_row(n, Answer("number", values[n]), regions=regions[n]) for n in range(60)]
    assert accuracy(predict(rows[:40], rows[40:], with_regions=True)["regions"]) < 0.05
    assert "regions" not in predict(rows[:40], rows[40:])
    lacking = [*rows[:39], make_row(39, Answer("number", values[39]))]
    assert "regions" not in predict(lacking, rows[40:], with_regions=True)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("T1/task: 1 subjects")
    assert "sub-039" in message


def test_predictions_have_probabilities_of_the_rows_own_options(predict: Any, make_row: MakeRow) -> None:
    values = ["a"] * 6 + ["b"] * 2 + ["c"] * 2
    train = [make_row(n, Answer("choice", value, ("a", "b", "c"))) for n, value in enumerate(values)]
    options = [("c", "b", "a"), ("b", "new"), ("new", "other")]
    test = [make_row(20 + n, Answer("choice", own[-1], own)) for n, own in enumerate(options)]
    known, new, neither = predict(train, test)["constant"]
    assert known.option_scores == pytest.approx([math.log(0.2), math.log(0.2), math.log(0.6)])
    assert (known.predicted, known.score, known.subject) == ("a", 1.0, "SUB-020")
    assert (new.predicted, new.score) == ("b", 0.0)
    assert math.exp(new.option_scores[1]) == pytest.approx(0)
    assert math.isfinite(new.option_scores[1])
    assert neither.option_scores == pytest.approx([math.log(0.5)] * 2)


def test_questions_without_training_rows_and_texts_are_left_out_with_a_message(
    predict: Any, make_row: MakeRow, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train = [make_row(n, side(n % 2)) for n in range(6)]
    test = [
        make_row(10, side(0)),
        make_row(11, side(0), task="new"),
        make_row(12, side(0), num_scans=2),
        make_row(13, Answer("text", "free"), task="words"),
    ]
    found = predict(train, test)
    assert all([each.subject for each in own] == ["SUB-010"] for own in found.values())
    assert {record.getMessage().split(":")[0] for record in caplog.records} == {"T1/new", "T1/task", "T1/words"}


def test_several_scans_are_joined_and_none_leaves_the_texts(predict: Any, make_row: MakeRow, side: Side) -> None:
    sides = coin()
    pairs = [make_row(n, side(sides[n]), signal=2 * sides[n], num_scans=2) for n in range(60)]
    found = predict(pairs[:40], pairs[40:])
    assert accuracy(found["volume"]) > 0.9
    assert {each.modality for each in found["cnn"]} == {"T1"}
    texts = [make_row(n, side(sides[n]), num_scans=0) for n in range(60)]
    assert list(predict(texts[:40], texts[40:])) == ["constant", "text"]


def test_one_answer_in_training_is_the_answer_of_all(predict: Any, make_row: MakeRow, side: Side) -> None:
    train = [make_row(n, side(1)) for n in range(4)]
    for own in predict(train, [make_row(9, side(0))]).values():
        assert [each.predicted for each in own] == ["right"]


def test_two_spellings_of_a_subject_are_one(make_row: MakeRow, side: Side) -> None:
    rows = [make_row(1, side(0), subject="sub-01"), make_row(2, side(1), subject="01")]
    assert len(set(compare._targets(rows).subjects.tolist())) == 1


def test_metrics_are_those_of_the_model_under_the_name_of_the_baseline(
    predict: Any, make_row: MakeRow, side: Side
) -> None:
    rows = [make_row(n, side(n % 2), signal=3 * (n % 2)) for n in range(30)]
    rows += [make_row(n, Answer("number", float(n)), task="age") for n in range(30)]
    found = predict(rows[:20] + rows[30:50], rows[20:30] + rows[50:])
    metrics = summarise_baselines(found)
    assert metrics["baseline/constant/accuracy/T1/task"] == 0.5
    assert metrics["baseline/volume/accuracy/T1/task"] == accuracy([p for p in found["volume"] if p.task == "task"])
    assert metrics["baseline/constant/error/T1/age"] == pytest.approx(np.mean(np.arange(20, 30) - 9.5))
    assert not any(key.startswith("eval/") for key in metrics)
