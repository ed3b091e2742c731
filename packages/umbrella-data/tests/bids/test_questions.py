"""Questions have texts and answers that agree."""

from __future__ import annotations

import pytest

from umbrella_data.bids.questions import AGE, METADATA_QUESTIONS, SEX, ScanMetadata, choice_question, number_question
from umbrella_data.modality import MODALITIES

ALL = (*METADATA_QUESTIONS, AGE, SEX, choice_question("diagnosis", options=("AD", "MCI", "no")))


def metadata(modality, **options):
    return ScanMetadata(modality, labels={"age": 41.5, "sex": "male", "diagnosis": "MCI"}, **options)


@pytest.mark.parametrize("modality", MODALITIES)
def test_scan_of_any_modality_without_labels_has_a_question(modality):
    exchanges = [question.ask(ScanMetadata(modality), draw=0) for question in METADATA_QUESTIONS]
    assert any(exchanges)


@pytest.mark.parametrize("question", ALL, ids=lambda question: question.task)
@pytest.mark.parametrize("draw", range(6))
def test_answer_text_has_the_value(question, draw):
    text, answer_text, answer = question.ask(metadata("rsfMRI", num_frames=32, num_b0=2), draw=draw)
    assert text in question.texts
    if answer["type"] == "choice":
        assert answer_text == answer["value"] in answer["options"]
    else:
        assert float(answer_text) == answer["value"]
        assert answer["unit"] == question.unit


def test_wording_varies_with_the_draw_and_is_the_same_for_one_draw():
    texts = [AGE.ask(metadata("T1"), draw=draw)[0] for draw in range(20)]
    assert set(texts) == set(AGE.texts)
    assert texts == [AGE.ask(metadata("T1"), draw=draw)[0] for draw in range(20)]


def test_question_that_does_not_apply_is_left_out():
    tasks = [question.task for question in ALL if question.ask(ScanMetadata("T1"), draw=0)]
    assert tasks == ["modality"]


def test_number_question_has_its_unit():
    assert number_question("reaction_time", unit="ms").texts == ("What is the reaction time of this person, in ms?",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1512345.5, "1512345.5"),
        (1.234e-05, "0.00001234"),
        (38.78, "38.78"),
        (33.0, "33"),
        (-7, "-7"),
        (1e22, "1" + 22 * "0"),
    ],
)
def test_number_is_written_with_all_digits_and_no_exponent(value, text):
    assert number_question("x", unit=None).ask(ScanMetadata("T1", labels={"x": value}), draw=0)[1] == text
