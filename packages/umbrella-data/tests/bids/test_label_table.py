"""Rows of a BIDS tree's manifests: each rule about tables, JSON files and missing values changes one label."""

from __future__ import annotations

import json

import pytest

from umbrella_data.bids.manifests import write_manifests
from umbrella_data.errors import ManifestError

TABLE = [
    "participant_id\tage\tsex\tdx\tscore",
    "sub-01\t30\tM\tAD\t10",
    "sub-02\t40\tF\tMCI\t20",
    "sub-03\t50\tF\tAD\t30",
]


@pytest.fixture
def tree(nifti, random_voxels):
    """Three subjects with a T1w; sub-03 has two visits."""
    for name in (
        "sub-01/anat/sub-01",
        "sub-02/anat/sub-02",
        *(f"sub-03/{v}/anat/sub-03_{v}" for v in ("ses-1", "ses-2")),
    ):
        nifti.write(random_voxels(4, 5, 6), f"bids/{name}_T1w.nii")
    write_table(nifti.folder / "bids", TABLE)
    return nifti.folder / "bids"


def write_table(tree, lines, name="participants.tsv"):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("".join(f"{line}\n" for line in lines))


def write_json(tree, content, name="participants.json"):
    (tree / name).write_text(json.dumps(content))


def labels(tree, *, choices=("dx",), numbers=None, **options):
    """Values by scan and task, and the messages."""
    numbers = {"score": None} if numbers is None else numbers
    report = write_manifests(
        tree, out=tree.parent / "out", test_fraction=0.0, choices=choices, numbers=numbers, **options
    )
    rows = {
        (row["id"].split("_T1w_")[0], row["task"]): (row["answer"]["value"], row["answer"].get("unit"))
        for row in report.rows["train"]
        if row["task"] != "modality"
    }
    return rows, report.messages


def changes(tree, change, **options):
    """The labels that a change to the tree changes or removes, and the messages that it adds."""
    before, old = labels(tree)
    change(tree)
    after, new = labels(tree, **options)
    changed = {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return changed, [message for message in new if message not in old]


# Each case: the line of sub-01, the JSON file, options; the task that differs, its value, and the start of a message.
CASES = {
    "age code": ("-999 M AD 10", {}, {}, "age", None, "values of age such as"),
    "age code of a pandas table": ("999.0 M AD 10", {}, {}, "age", None, "values of age such as"),
    "impossible age": ("-1 M AD 10", {}, {}, "age", None, "values of age outside 0 to 120"),
    "age too large": ("121 M AD 10", {}, {}, "age", None, "values of age outside 0 to 120"),
    "age of 99": ("99 M AD 10", {}, {}, "age", 99.0, None),
    "age of 99 declared": ("99 M AD 10", {"age": {"Missing": 99}}, {}, "age", None, "values of age declared"),
    "decimal comma": ("38,5 M AD 10", {}, {}, "age", None, "numbers of age with a comma"),
    "number code": ("30 M AD -9", {}, {}, "score", None, "values of score such as"),
    "number of -1": ("30 M AD -1", {}, {}, "score", -1.0, None),
    "number of 88": ("30 M AD 88", {}, {}, "score", 88.0, None),
    "number declared as level": (
        "30 M AD 88", {"score": {"Levels": {"88": {"Description": "Not available"}}}}, {}, "score", None,
        "values of score declared",
    ),
    "option for a column": ("30 M AD 88", {}, {"missing": ["score=88.0"]}, "score", None, "values of score declared"),
    "option for all columns": ("30 M AD 88", {}, {"missing": ["88", "x"]}, "score", None, "values of score declared"),
    "code within the declared range": (
        "30 M AD 999", {"score": {"Minimum": 0, "Maximum": 1000}}, {}, "score", 999.0, None
    ),
    "outside the declared range": (
        "30 M AD 31", {"score": {"Maximum": 30}}, {}, "score", None, "values of score outside its"
    ),
    "sex as a level": ("30 2.0 AD 10", {"sex": {"Levels": {"2": "female"}}}, {}, "sex", "female", None),
    "sex as a level with other words": ("30 M AD 10", {"sex": {"Levels": {"M": "a woman"}}}, {}, "sex", "female", None),
    "sex as a level with an unknown word": (
        "30 M AD 10", {"sex": {"Levels": {"M": "mujer"}}}, {}, "sex", None, "invalid values of sex"
    ),
    "sex as the key of a level": ("30 2 AD 10", {"sex": {"Levels": {"female": "2"}}}, {}, "sex", "female", None),
    "sex as a word": ("30 Woman AD 10", {}, {}, "sex", "female", None),
    "sex as a number": ("30 1 AD 10", {}, {}, "sex", None, "numbers of sex without Levels"),
    "no level": ("30 M XX 10", {"dx": {"Levels": ["AD", "MCI"]}}, {}, "dx", None, "values of dx that are none of"),
    "age with words as levels": (
        "1 M AD 10", {"age": {"Levels": {"1": "18-29"}}}, {}, "age", None, "levels of age are words"
    ),
    "number with words as reversed levels": (
        "30 M AD 1", {"score": {"Levels": {"low": 1}}}, {}, "score", None, "levels of score are words"
    ),
    "number as its own level": ("30 M AD 11", {"score": {"Levels": {"11": "11.0"}}}, {}, "score", 11.0, None),
    "sex that is negated": ("30 0 AD 10", {"sex": {"Levels": {"0": "not male", "1": "male"}}}, {}, "sex", None,
                            "invalid values of sex"),
    "sex that is no": ("30 0 AD 10", {"sex": {"Levels": {"0": "male = 0"}}}, {}, "sex", None, "invalid values of sex"),
    "choice with reversed levels": ("30 M 2 10", {"dx": {"Levels": {"AD": "AD", "MCI": 2}}}, {}, "dx", "MCI", None),
    "code beside words": ("30 M -999.0 10", {}, {}, "dx", None, "values of dx such as"),
    "level that looks missing": (
        "30 M - 10", {"dx": {"Levels": {"-": "none", "AD": "AD", "MCI": "MCI"}}}, {}, "dx", "none", None
    ),
    "level by word": ("30 M mci 10", {"dx": {"Levels": {"AD": "AD", "1": "MCI"}}}, {}, "dx", "MCI", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule_changes_one_row(tree, case):
    line, described, options, task, value, message = CASES[case]
    cells = dict(zip(("age", "sex", "dx", "score"), line.split(), strict=True))

    def change(tree):
        write_table(tree, [TABLE[0], "\t".join(["sub-01", *cells.values()]), *TABLE[2:]])
        write_json(tree, described)

    changed, messages = changes(tree, change, **options)
    assert {key: label and label[0] for key, label in changed.items()} == {("sub-01", task): value}
    if message is None:
        assert messages == []
    else:
        (found,) = messages
        assert found.startswith(message)
        assert found.endswith(f": 1 (sub-01: {cells[task]!r})")


@pytest.mark.parametrize(
    ("unit", "value"),
    [("months", 3.33), ("Weeks", 0.77), ("days", 0.11), ("yr", 40.0), ({"Description": "in days"}, 0.11)],
)
def test_ages_are_converted_to_years(tree, unit, value):
    write_json(tree, {"age": unit if isinstance(unit, dict) else {"Units": unit}})
    rows, _ = labels(tree)
    assert rows["sub-02", "age"] == (value, "years")


def test_age_limit_and_codes_are_in_the_unit_of_the_table(tree):
    write_json(tree, {"age": {"Units": "months"}})
    write_table(tree, [TABLE[0], "sub-01\t999\tM\tAD\t10", "sub-02\t300\tF\tMCI\t20", "sub-03\t1441\tF\tAD\t30"])
    rows, messages = labels(tree)
    # 1441 months are more than 120 years, and do not extend the range that 999 is compared with.
    assert {key[0]: value[0] for key, value in rows.items() if key[1] == "age"} == {"sub-02": 25.0}
    write_table(tree, [TABLE[0], "sub-01\t999\tM\tAD\t10", "sub-02\t1100\tF\tMCI\t20", "sub-03\t900\tF\tAD\t30"])
    rows, messages = labels(tree)
    assert rows["sub-01", "age"] == (83.25, "years")
    assert not any("age such as" in message for message in messages)


@pytest.mark.parametrize("described", [{"Units": "fortnights"}, {"Units": "weeks", "LongName": "Postmenstrual age"}])
def test_age_in_an_unknown_unit_is_left_out_unless_asked_about_in_this_unit(tree, described):
    write_json(tree, {"age": described})
    rows, messages = labels(tree)
    assert not any(task == "age" for _, task in rows)
    (message,) = [message for message in messages if message.startswith("values of age in ")]
    assert described["Units"] in message
    rows, _ = labels(tree, numbers={"age": None})
    value, unit = rows["sub-02", "age"]
    assert value == 40.0
    assert unit.startswith(described["Units"])


def test_columns_are_described_in_another_case(tree):
    write_table(tree, [TABLE[0].replace("age", "Age"), *TABLE[1:]])
    write_json(tree, {"age": {"Units": "months"}})
    assert labels(tree)[0]["sub-02", "age"] == (3.33, "years")
    write_json(tree, {"age": {"Units": "months"}, "Age": {"Units": "days"}})
    assert labels(tree)[0]["sub-02", "age"] == (0.11, "years")


def test_number_has_the_declared_unit_and_another_one_is_rejected(tree):
    write_json(tree, {"age": {"Units": "months"}, "score": {"Units": "Points"}})
    rows, _ = labels(tree, numbers={"age": None, "score": None})
    assert (rows["sub-02", "age"], rows["sub-02", "score"]) == ((40.0, "months"), (20.0, "Points"))
    rows, _ = labels(tree, numbers={"age": "mo", "score": "point"})
    assert (rows["sub-02", "age"], rows["sub-02", "score"]) == ((40.0, "mo"), (20.0, "point"))
    with pytest.raises(ManifestError) as caught:
        labels(tree, numbers={"age": "years", "score": "ml"})
    age, score = caught.value.problems
    assert all(word in age for word in ("participants.json", "'age'", "'months'", "'years'"))
    assert all(word in score for word in ("'score'", "'Points'", "'ml'"))


def test_age_asked_in_months_has_its_limit_in_months(tree):
    write_table(tree, [TABLE[0], "sub-01\t1441\tM\tAD\t10", *TABLE[2:]])
    assert ("sub-01", "age") in labels(tree, numbers={"age": "weeks"})[0]
    rows, _ = labels(tree, numbers={"age": "months"})
    assert ("sub-01", "age") not in rows
    assert rows["sub-02", "age"] == (40.0, "months")


def test_units_of_two_tables_must_agree(tree):
    write_json(tree, {"score": {"Units": "points"}})
    write_table(tree, ["participant_id\tscore", "sub-09\t1"], "more.tsv")
    write_json(tree, {"score": {"Units": "percent"}}, "more.json")
    both = [tree / "participants.tsv", tree / "more.tsv"]
    with pytest.raises(ManifestError, match=r"'percent' and 'points'"):
        labels(tree, participants=both)
    write_json(tree, {"score": {"Units": "Point"}}, "more.json")
    assert labels(tree, participants=both)[0]["sub-01", "score"] == (10.0, "points")


def test_numeric_choice_leaves_out_codes_and_declared_ones(tree):
    table = [TABLE[0], "sub-01\t30\tM\t0\t10", "sub-02\t40\tF\t1\t20", "sub-03\t50\tF\t-9\t30"]
    write_table(tree, table)
    rows, messages = labels(tree)
    assert {value[0] for key, value in rows.items() if key[1] == "dx"} == {"0", "1"}
    assert any(message.startswith("values of dx such as -999") for message in messages)
    # A level is a value.
    write_json(tree, {"dx": {"Levels": {"0": "no", "1": "mild", "-9": {"LongName": "severe"}}}})
    assert {value[0] for key, value in labels(tree)[0].items() if key[1] == "dx"} == {"no", "mild", "severe"}
    write_json(tree, {})
    write_table(tree, [*table[:2], table[2].replace("\t1\t", "\tAD\t"), table[3]])
    assert {value[0] for key, value in labels(tree)[0].items() if key[1] == "dx"} == {"0", "AD"}


@pytest.mark.parametrize("cell", ["<NA>", "NULL", "?", ".", "-", "#N/A", "NaN"])
def test_cells_that_are_missing_in_every_column(tree, cell):
    write_table(tree, [TABLE[0], f"sub-01\t{cell}\t{cell}\t{cell}\t{cell}", *TABLE[2:]])
    rows, messages = labels(tree)
    assert not any(subject == "sub-01" for subject, _ in rows)
    assert not any(repr(cell) in message for message in messages)


@pytest.mark.parametrize("cell", ["None", "unknown", "other"])
def test_words_that_may_be_answers_are_kept(tree, cell):
    write_table(tree, [TABLE[0], f"sub-01\t30\tM\t{cell}\t10", *TABLE[2:]])
    assert labels(tree)[0]["sub-01", "dx"] == (cell, None)


@pytest.mark.parametrize(
    ("spellings", "kept"),
    [
        (("AD", "ad", "ad"), "ad"),
        (("AD", "AD.", "x"), "AD"),
        (("caf\xe9", "cafe\u0301", "x"), "caf\xe9"),
        (("1.0", "1", "2"), "1.0"),
    ],
)
def test_spellings_of_one_option_are_merged_and_counted(tree, spellings, kept):
    write_table(tree, [TABLE[0], *(f"sub-0{i + 1}\t30\tM\t{cell}\t10" for i, cell in enumerate((*spellings, "z")))])
    rows, messages = labels(tree)
    assert rows["sub-01", "dx"] == rows["sub-02", "dx"] == (kept, None)
    (message,) = [message for message in messages if message.startswith("spellings of dx")]
    assert ": 1 (" in message
    assert message.endswith(f" as {kept!r})")


def test_two_tables_may_spell_an_option_differently(tree):
    write_table(tree, ["participant_id\tdx", "sub-01\tad", "sub-02\tMCI"], "more.tsv")
    assert labels(tree, participants=[tree / "participants.tsv", tree / "more.tsv"])[0]["sub-01", "dx"] == ("AD", None)


def test_blanks_around_column_names_are_removed(tree):
    before, _ = labels(tree)
    write_table(tree, [TABLE[0].replace("age", "age ").replace("sex", " sex"), *TABLE[1:]])
    write_json(tree, {" score ": {"Maximum": 20}})
    after, _ = labels(tree)
    assert before.keys() - after.keys() == {("sub-03_ses-1", "score"), ("sub-03_ses-2", "score")}
    assert after.items() <= before.items()


def test_key_that_a_json_file_has_twice_is_named(tree):
    (tree / "participants.json").write_text('{"age": {"Units": "months"}, "age": {"Units": "years"}}')
    with pytest.raises(ManifestError, match=r"participants\.json.*\n.*'age' more than once"):
        labels(tree)


def visits(rows, task="age"):
    return {key[0]: value[0] for key, value in rows.items() if key[1] == task and key[0].startswith("sub-03")}


def test_one_age_of_several_visits_is_kept_and_counted(tree):
    rows, messages = labels(tree)
    assert visits(rows) == {"sub-03_ses-1": 50.0, "sub-03_ses-2": 50.0}
    (message,) = [message for message in messages if "one age for several visits" in message]
    assert message.endswith(": 1 (sub-03)")


@pytest.mark.parametrize("cell", ["ses-2", "2"])
def test_visits_of_a_long_table_have_their_own_labels(tree, cell):
    table = ["participant_id session_id age sex dx score", "sub-01 n/a 30 M AD 10", "sub-02  40 F MCI 20",
             "sub-03 1 50 F AD 30", f"sub-03 {cell} 52 F AD n/a"]  # fmt: skip
    write_table(tree, [line.replace(" ", "\t") for line in table])
    rows, messages = labels(tree)
    assert visits(rows) == {"sub-03_ses-1": 50.0, "sub-03_ses-2": 52.0}
    assert visits(rows, "score") == {"sub-03_ses-1": 30.0}
    assert rows["sub-01", "age"] == (30.0, "years")
    assert messages == ["3 of 3 subjects of the table have a scan that is used"]


def test_tree_without_sessions_has_the_labels_of_a_subject_s_only_visit(tree):
    table = ["participant_id session_id age sex dx score", "sub-01 ses-9 30 M AD 10", "sub-02 ses-1 40 F MCI 20",
             "sub-02 ses-2 42 F MCI 20", "sub-03 1 50 F AD 30", "sub-03 2 52 F AD 30"]  # fmt: skip
    write_table(tree, [line.replace(" ", "\t") for line in table])
    rows, messages = labels(tree)
    assert rows["sub-01", "age"] == (30.0, "years")
    assert ("sub-02", "age") not in rows  # which of the two visits was scanned?
    assert messages[1].endswith(": 1 (sub-02)")


def test_sessions_table_replaces_the_columns_that_it_has(tree):
    sessions = "sub-03/sub-03_sessions.tsv"
    write_table(tree, ["session_id\tage", "ses-1\t51", "ses-2\tn/a"], sessions)
    rows, messages = labels(tree)
    assert visits(rows) == {"sub-03_ses-1": 51.0}
    assert visits(rows, "sex") == {"sub-03_ses-1": "female", "sub-03_ses-2": "female"}
    assert messages == ["3 of 3 subjects of the table have a scan that is used"]
    write_table(tree, ["session_id\tage", "ses-1\t51"], sessions)
    rows, messages = labels(tree)
    assert visits(rows) == {"sub-03_ses-1": 51.0}
    assert messages[1].startswith("scans without a line of their visit")
    assert messages[1].endswith(": 1 (sub-03 ses-2)")
    (tree / "participants.tsv").unlink()
    rows, _ = labels(tree, choices=(), numbers={})
    assert rows == {("sub-03_ses-1", "age"): (51.0, "years")}
    write_table(tree, ["session_id\tage", "n/a\t51", "ses-1\t1", "1\t2"], sessions)
    with pytest.raises(
        ManifestError, match=r"sessions\.tsv: 2 problems\n  line 2: .*\n  line 4: duplicate session ses-1"
    ):
        labels(tree, choices=(), numbers={})


def test_codes_of_all_sessions_tables_are_compared_together(tree):
    write_table(tree, ["session_id\tscore", "ses-1\t999"], "sub-03/sub-03_sessions.tsv")
    assert visits(labels(tree)[0], "score") == {}
    write_table(tree, ["session_id\tscore", "ses-1\t1200"], "sub-01/sub-01_sessions.tsv")
    write_table(tree, ["session_id\tscore", "ses-1\t12"], "sub-02/sub-02_sessions.tsv")
    assert visits(labels(tree)[0], "score") == {"sub-03_ses-1": 999.0}


@pytest.mark.parametrize("name", ["participants.json", "sessions.json", "sub-03/sub-03_sessions.json"])
def test_sessions_tables_are_described_by_the_nearest_json_file(tree, name):
    for described in ("participants.json", "sessions.json", "sub-03/sub-03_sessions.json"):
        write_json(tree, {"age": {"Units": "weeks"}}, described)
        if described == name:
            write_json(tree, {"age": {"Units": "months"}}, described)
            break
    write_table(tree, ["session_id\tage", "ses-1\t600"], "sub-03/sub-03_sessions.tsv")
    assert visits(labels(tree)[0]) == {"sub-03_ses-1": 50.0}


def test_sessions_tables_next_to_a_given_table_are_read(tree):
    other = tree.parent / "raw"
    (tree / "participants.tsv").unlink()
    write_table(other, TABLE, "participants.tsv")
    write_table(other, ["session_id\tage", "ses-1\t51", "ses-2\t53"], "sub-03/sub-03_sessions.tsv")
    rows, _ = labels(tree, participants=other / "participants.tsv")
    assert visits(rows) == {"sub-03_ses-1": 51.0, "sub-03_ses-2": 53.0}
    write_table(tree, ["session_id\tage", "ses-1\t60"], "sub-03/sub-03_sessions.tsv")
    with pytest.raises(ManifestError, match=r"sub-03 ses-1: age is 60\.0, but 51\.0"):
        labels(tree, participants=other / "participants.tsv")


@pytest.mark.parametrize("name", ["participants.json", "sessions.json", "sub-03/sub-03_sessions.tsv"])
def test_own_files_of_a_tree_may_not_be_links_out_of_data_root(tree, name):
    write_table(tree, ["session_id\tage", "ses-1\t51"], "sub-03/sub-03_sessions.tsv")
    outside = tree.parent / "outside"
    outside.write_text((tree / name).read_text() if (tree / name).exists() else "{}")
    (tree / name).unlink(missing_ok=True)
    (tree / name).symlink_to(outside)
    with pytest.raises(ManifestError) as caught:
        labels(tree)
    assert caught.value.path == str(tree / name)
    assert visits(labels(tree, data_root=tree.parent)[0]) == {"sub-03_ses-1": 51.0}
    outside.unlink()
    with pytest.raises(ManifestError):
        labels(tree, data_root=tree.parent)


def test_json_next_to_a_given_table_elsewhere_may_not_be_a_link_out_of_its_folder(tree):
    other, secret = tree.parent / "raw", tree.parent / "secret.json"
    write_table(other, TABLE, "participants.tsv")
    secret.write_text("{}")
    (other / "participants.json").symlink_to(secret)
    with pytest.raises(ManifestError) as caught:
        labels(tree, participants=other / "participants.tsv")
    assert caught.value.path == str(other / "participants.json")


@pytest.mark.parametrize(
    "text", ["[]", "{", "1" * 5000, '{"a":' * 100_000, "\xff\xfe", f'{{"a": "{"b" * (1 << 22)}"}}']
)
def test_json_file_that_cannot_be_parsed_is_rejected(tree, text):
    (tree / "participants.json").write_text(text, encoding="latin-1")
    with pytest.raises(ManifestError) as caught:
        labels(tree)
    assert caught.value.path == str(tree / "participants.json")


def test_all_problems_of_descriptions_are_reported_at_once(tree):
    write_json(
        tree,
        {
            "age": {"Units": 3, "Minimum": "low", "Missing": [True]},
            "sex": {"Levels": {"1": ["male"], "2": "\ud800"}},
            "dx": "a text",
            "score": {"Levels": "0 to 30"},
            "site": 3,
        },
    )
    with pytest.raises(ManifestError) as caught:
        labels(tree)
    places = [problem.replace(":", "").split()[1] for problem in caught.value.problems]
    assert places == ["'age'", "'age'", "'age'", "'sex'", "'sex'", "'dx'", "'score'"]


def test_missing_names_a_column_of_the_table(tree):
    with pytest.raises(ManifestError, match="no column 'agee'"):
        labels(tree, missing=["agee=-9"])


def test_lines_of_visits_without_session_id_are_rejected_by_this_name(tree):
    write_table(tree, [*TABLE, TABLE[1]])
    with pytest.raises(ManifestError, match=r"line 5: duplicate subject sub-01.* session_id"):
        labels(tree)
    write_table(tree, ["participant_id\tsession_id\tage", "sub-01\tn/a\t1", "sub-01\t\t2", "sub-01\tses-\t2"])
    with pytest.raises(ManifestError) as caught:
        labels(tree, choices=(), numbers={})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 3", "line 4"]
