"""Labels and questions from participants tables, and messages about invalid values."""

from __future__ import annotations

import pytest

from umbrella_data.bids.label_files import table_files
from umbrella_data.bids.participants import read_participants
from umbrella_data.errors import ManifestError


def read(paths, **options):
    return read_participants([[table_files(path, base=path.parent)] for path in paths], **options)


def labels_of(participants):
    """By subject, for tables without sessions."""
    return {subject: labels for (subject, session), labels in participants.labels.items() if session is None}


@pytest.fixture
def write_tsv(tmp_path):
    def write(text):
        path = tmp_path / "participants.tsv"
        path.write_text(text, encoding="utf-8-sig")
        return path

    return write


def test_age_and_sex_are_read_and_missing_values_left_out(write_tsv):
    participants = read(
        [
            write_tsv(
                "participant_id\tAge\tsex\tsite\nsub-1\t38.78\tM\tA\n2\tn/a\tfemale\tB\nsub-3\t\tn/a\tB\nsub-4\t50\n"
            )
        ]
    )
    assert labels_of(participants) == {
        "sub-1": {"age": 38.78, "sex": "male"},
        "sub-2": {"sex": "female"},
        "sub-3": {},
        "sub-4": {"age": 50.0},
    }
    assert [question.task for question in participants.questions] == ["age", "sex"]
    assert participants.messages == ()


def test_blank_lines_are_skipped_and_the_prefix_is_read_in_any_case(write_tsv):
    text = "participant_id\tage\tsex\nSub-AbC\t30\tM\n\t\t\n \t\n\t\t\t\t\nSUB-2\t40\n\n"
    assert labels_of(read([write_tsv(text)])) == {
        "sub-AbC": {"age": 30.0, "sex": "male"},
        "sub-2": {"age": 40.0},
    }


def test_invalid_value_is_left_out_with_a_message(write_tsv):
    participants = read([write_tsv("participant_id\tage\tsex\nsub-1\t89+\tO\n")])
    assert labels_of(participants) == {"sub-1": {}}
    assert participants.questions == ()
    age, sex = participants.messages
    assert age.endswith(": 1 (sub-1: '89+')")
    assert sex.endswith(": 1 (sub-1: 'O')")


def test_named_column_gives_a_question(write_tsv):
    participants = read(
        [write_tsv("participant_id\tdiagnosis\tmmse\nsub-1\tMCI\t25\nsub-2\tAD\t20.5\nsub-3\tn/a\tbad\n")],
        choices=["diagnosis"],
        numbers={"mmse": "points"},
    )
    assert labels_of(participants)["sub-2"] == {"diagnosis": "AD", "mmse": 20.5}
    diagnosis, mmse = participants.questions
    assert (diagnosis.task, diagnosis.options) == ("diagnosis", ("AD", "MCI"))
    assert (mmse.task, mmse.unit) == ("mmse", "points")
    (message,) = participants.messages
    assert message.endswith(": 1 (sub-3: 'bad')")


def test_choice_needs_two_different_values(write_tsv):
    path = write_tsv("participant_id\tsite\nsub-1\tA\nsub-2\tA\n")
    assert read([path], choices=["site"]).questions == ()


def test_messages_of_one_kind_are_one_line_with_the_first_items(write_tsv):
    rows = "".join(f"sub-{i}\t89+\n" for i in range(7))
    (message,) = read([write_tsv(f"participant_id\tage\n{rows}")]).messages
    assert ": 7 (sub-0: '89+', " in message
    assert message.endswith("sub-4: '89+' and 2 more)")


def test_missing_file_is_rejected_and_no_file_gives_no_labels(tmp_path):
    assert labels_of(read([])) == {}
    with pytest.raises(ManifestError, match=r"participants\.tsv: 1 problem\n"):
        read([tmp_path / "participants.tsv"])


def test_csv_table_is_comma_separated(tmp_path):
    path = tmp_path / "volumes.csv"
    path.write_text('participant_id,Left-Hippocampus,dx\nsub-1,4012.5,"AD, late"\n2,3900,no\n')
    participants = read([path], choices=["dx"], numbers={"Left-Hippocampus": "mm3"})
    assert labels_of(participants)["sub-1"] == {"Left-Hippocampus": 4012.5, "dx": "AD, late"}
    assert labels_of(participants)["sub-2"] == {"Left-Hippocampus": 3900.0, "dx": "no"}


@pytest.mark.parametrize(
    ("name", "text", "found", "needed"),
    [
        ("a.tsv", "participant_id,age\n1,3\n", "commas", "tabs"),
        ("a.csv", "participant_id;age\n1;3\n", "semicolons", "commas"),
        ("a.csv", "participant_id\tage\n1\t3\n", "tabs", "commas"),
    ],
)
def test_table_with_the_wrong_separator_is_rejected(tmp_path, name, text, found, needed):
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=f"separated by {found}; use {needed}"):
        read([tmp_path / name])


def test_table_that_is_not_utf8_is_rejected(tmp_path):
    (tmp_path / "a.csv").write_bytes("participant_id,site\n1,Köln\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"a\.csv: 1 problem\n.*UTF-8"):
        read([tmp_path / "a.csv"])


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"])
def test_spreadsheet_is_rejected_with_what_to_do(tmp_path, start):
    (tmp_path / "labels.xlsx").write_bytes(start + bytes(range(256)))
    with pytest.raises(ManifestError, match=r"labels\.xlsx: 1 problem\n.*save the sheet as CSV"):
        read([tmp_path / "labels.xlsx"])


def test_table_without_participant_id_is_rejected_with_what_to_do(tmp_path):
    (tmp_path / "a.csv").write_text("subject,age\n1,3\n")
    with pytest.raises(ManifestError, match=r"no column 'participant_id' among subject, age; rename"):
        read([tmp_path / "a.csv"])


def test_unclosed_quote_is_rejected(tmp_path):
    rows = [f"sub-{i:02d},3{i},fine" for i in range(2, 10)]
    text = "\n".join(["participant_id,age,comment", "sub-00,30,fine", 'sub-01,31,"fell asleep', *rows, ""])
    tabs, commas = tmp_path / "a.tsv", tmp_path / "a.csv"
    tabs.write_text(text.replace(",", "\t"))
    labels = labels_of(read([tabs], choices=["comment"]))
    assert len(labels) == 10
    assert labels["sub-01"] == {"age": 31.0, "comment": '"fell asleep'}
    for open_quote in (text, text.replace("39,fine", '39,"fine"')):
        commas.write_text(open_quote)
        with pytest.raises(ManifestError, match=r"a\.csv: 1 problem\n  after line 2: .*quote"):
            read([commas])


def test_tables_are_joined_by_subject_where_they_agree(tmp_path):
    first, second = tmp_path / "a.tsv", tmp_path / "b.csv"
    first.write_text("participant_id\tage\tsex\tsite\nsub-1\t40\tM\tA\nsub-2\tn/a\tF\tA\n")
    second.write_text("participant_id,age,site,icv\n1,40.0,B,1400000\n2,50,B,1500000\n3,60,B,n/a\n")
    assert labels_of(read([first, second], numbers={"icv": "mm3"})) == {
        "sub-1": {"age": 40.0, "sex": "male", "icv": 1400000.0},
        "sub-2": {"age": 50.0, "sex": "female", "icv": 1500000.0},
        "sub-3": {"age": 60.0},
    }
    with pytest.raises(ManifestError, match=r"b\.csv: 2 problems\n  sub-1: site is 'B', but 'A' in an earlier table"):
        read([first, second], choices=["site"])
    with pytest.raises(ManifestError, match=r"a\.tsv, .*b\.csv: 1 problem\n  line 1: no column 'iq'"):
        read([first, second], numbers={"iq": None})


def test_equivalent_columns_with_different_values_are_rejected(write_tsv):
    header = "participant_id\tsex\tgender\tage\tAge\n"
    good = write_tsv(header + "1\tM\tmale\t30\t30.0\n2\tn/a\tF\t\t40\n3\tF\tO\t50\tn/a\n")
    assert labels_of(read([good])) == {
        "sub-1": {"sex": "male", "age": 30.0},
        "sub-2": {"sex": "female", "age": 40.0},
        "sub-3": {"sex": "female", "age": 50.0},
    }
    bad = write_tsv(header + "1\tM\tM\t30\t30\n2\tM\tF\t40\t41\n")
    problems = (
        r"participants\.tsv: 2 problems\n"
        r"  line 3: sub-2: column 'sex' is 'M', .* 'gender' is 'F'; .*\n"
        r"  line 3: sub-2: column 'age' is '40', .* 'Age' is '41'; "
    )
    with pytest.raises(ManifestError, match=problems):
        read([bad])
    labels = labels_of(read([bad], choices=["sex", "gender"], numbers={"Age": None, "age": None}))
    assert labels["sub-2"] == {"sex": "M", "gender": "F", "age": 40.0, "Age": 41.0}
    assert labels_of(read([bad], choices=["sex"], numbers={"age": None}))["sub-2"] == {"sex": "M", "age": 40.0}


def test_compare_lists_subjects_without_a_scan_and_those_missing_in_the_table(write_tsv):
    participants = read([write_tsv("participant_id\tage\n1\t40\nsub-2\t50\nIXI03\t60\n")])
    (message,) = participants.compare([("sub-1", None), ("sub-2", None)])
    assert message.startswith("2 of 3 ")
    assert message.endswith(": sub-IXI03")
    (message,) = participants.compare([("sub-2", None), ("sub-ixi03", None)])
    assert message.startswith("1 of 3 ")
    assert ": sub-1, sub-IXI03; " in message
    assert message.endswith(": sub-ixi03")
    assert list(read([]).compare([("sub-1", None)])) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("subject\tage\nsub-1\t3\n", "no column 'participant_id' among subject, age"),
        ("participant_id\tage\nsub-1\t3\n1\t4\n", "line 3: duplicate subject sub-1"),
        ("participant_id\tage\nsub-1\t3\t4\n", "line 2: more cells"),
        ("participant_id\tage\n\t3\nsub-\t4\n", r"2 problems\n  line 2: participant_id is empty\n  line 3: "),
        ("participant_id\tage\nSub-1\t3\nsub-1\t4\n", "line 3: duplicate subject sub-1"),
        ("participant_id\tage\tage\t\t\nsub-1\t3\t4\n", r"1 problem\n  line 1: duplicate column 'age'"),
        ("participant_id\tage\nsub-1\t3\n", "line 1: no column 'iq'"),
    ],
)
def test_invalid_table_is_rejected(write_tsv, text, problem):
    with pytest.raises(ManifestError, match=problem):
        read([write_tsv(text)], numbers={"iq": None} if "iq" in problem else None)
