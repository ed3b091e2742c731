"""`participants.tsv` gives labels and questions, and says what it could not read."""

from __future__ import annotations

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.participants import read_participants


@pytest.fixture
def write_tsv(tmp_path):
    def write(text):
        path = tmp_path / "participants.tsv"
        path.write_text(text, encoding="utf-8-sig")
        return path

    return write


def test_age_and_sex_are_read_and_missing_values_are_no_labels(write_tsv):
    participants = read_participants(
        write_tsv("participant_id\tAge\tsex\tsite\nsub-1\t38.78\tM\tA\n2\tn/a\tfemale\tB\nsub-3\t\tn/a\tB\nsub-4\t50\n")
    )
    assert participants.labels == {
        "sub-1": {"age": 38.78, "sex": "male"},
        "sub-2": {"sex": "female"},
        "sub-3": {},
        "sub-4": {"age": 50.0},
    }
    assert [question.task for question in participants.questions] == ["age", "sex"]
    assert participants.notes == ()


def test_value_when_unreadable_is_left_out_with_a_note(write_tsv):
    participants = read_participants(write_tsv("participant_id\tage\tsex\nsub-1\t89+\tO\n"))
    assert participants.labels == {"sub-1": {}}
    assert participants.questions == ()
    assert len(participants.notes) == 2
    assert "sub-1: age '89+'" in participants.notes[0]


def test_column_when_asked_for_gives_a_question(write_tsv):
    participants = read_participants(
        write_tsv("participant_id\tdiagnosis\tmmse\nsub-1\tMCI\t25\nsub-2\tAD\t20.5\nsub-3\tn/a\tbad\n"),
        choices=["diagnosis"],
        numbers={"mmse": "points"},
    )
    assert participants.labels["sub-2"] == {"diagnosis": "AD", "mmse": 20.5}
    diagnosis, mmse = participants.questions
    assert (diagnosis.task, diagnosis.options) == ("diagnosis", ("AD", "MCI"))
    assert (mmse.task, mmse.unit) == ("mmse", "points")
    assert participants.notes == ("sub-3: mmse 'bad' is no label that can be read; left out",)


def test_choice_when_all_subjects_are_alike_is_no_question(write_tsv):
    path = write_tsv("participant_id\tsite\nsub-1\tA\nsub-2\tA\n")
    assert read_participants(path, choices=["site"]).questions == ()


def test_file_when_missing_gives_no_labels_unless_asked_for(tmp_path):
    path = tmp_path / "participants.tsv"
    assert read_participants(path).labels == {}
    with pytest.raises(ManifestError, match="diagnosis"):
        read_participants(path, choices=["diagnosis"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("subject\tage\nsub-1\t3\n", "no column 'participant_id' among subject, age"),
        ("participant_id\tage\nsub-1\t3\n1\t4\n", "line 3: sub-1 stands in the file twice"),
        ("participant_id\tage\nsub-1\t3\t4\n", "line 2: more columns"),
        ("participant_id\tage\nsub-1\t3\n", "line 1: no column 'iq'"),
    ],
)
def test_file_with_a_mistake_is_refused(write_tsv, text, words):
    with pytest.raises(ManifestError, match=words):
        read_participants(write_tsv(text), numbers={"iq": None} if "iq" in words else None)
