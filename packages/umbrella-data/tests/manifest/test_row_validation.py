"""Validation of canonical rows reports every problem of a row at once."""

from __future__ import annotations

import pytest

from umbrella_data.manifest.row_validation import parse_row
from umbrella_data.manifest.sample import Answer, Scan, Turn


@pytest.fixture
def root(tmp_path):
    return tmp_path.resolve()


def problems_of(row, root):
    sample, problems = parse_row(row, root=root)
    assert (sample is None) == bool(problems)
    return "\n".join(problems)


def test_row_of_the_documentation_is_read(root):
    row = {
        "id": "sub-01_sex",
        "subject": "sub-01",
        "task": "sex",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "modality": "T1", "path": "sub-01/anat/sub-01_T1w.nii.gz"},
                    {"type": "text", "text": "What is the sex of this person?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "female"}]},
        ],
        "answer": {"type": "choice", "options": ["female", "male"], "value": "female"},
    }
    sample, problems = parse_row(row, root=root)
    assert problems == []
    assert sample.messages == (
        Turn("user", (Scan("T1", (root / "sub-01/anat/sub-01_T1w.nii.gz",)), "What is the sex of this person?")),
        Turn("assistant", ("female",)),
    )
    assert sample.answer == Answer("choice", "female", ("female", "male"))
    assert (sample.id, sample.subject, sample.task) == ("sub-01_sex", "sub-01", "sex")
    assert sample.modalities == ("T1",)


def test_aliases_of_modalities_and_lists_of_maps_are_read(root, make_row):
    row = make_row("a", "bold", "DTI")
    row["messages"][0]["content"][1]["path"] = ["fa.nii.gz", "md.nii.gz"]
    sample, _ = parse_row(row, root=root)
    assert sample.modalities == ("rsfMRI", "dMRI")
    assert sample.scans[1].paths == (root / "fa.nii.gz", root / "md.nii.gz")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"type": "number", "value": 41, "unit": "years"}, Answer("number", 41.0, (), "years")),
        ({"type": "text", "value": "a brain"}, Answer("text", "a brain")),
        (None, None),
    ],
)
def test_answer_of_each_type_is_read(root, make_row, answer, expected):
    sample, problems = parse_row({**make_row("a", "T1"), "answer": answer}, root=root)
    assert not problems
    assert sample.answer == expected


def change(*keys, to):
    def apply(row):
        for key in keys[:-1]:
            row = row[key]
        row[keys[-1]] = to

    return apply


IMAGE = ("messages", 0, "content", 0)
MISTAKES = {
    "subject is a number": (change("subject", to=12), "'subject' is 12"),
    "empty id": (change("id", to=" "), "'id'"),
    "misspelt key": (change("anwser", to={}), "did you mean 'answer'"),
    "no messages": (change("messages", to=[]), "'messages'"),
    "unknown role": (change("messages", 0, "role", to="human"), "messages[0] "),
    "two users": (change("messages", 1, "role", to="user"), "roles are user, user"),
    "user last": (change("messages", slice(1, 2), to=[]), "roles are user;"),
    "scan without modality": (change(*IMAGE, "modality", to=None), "'modality'"),
    "unknown modality": (change(*IMAGE, "modality", to="rsfMR"), "did you mean 'rsfMRI'"),
    "no path": (change(*IMAGE, "path", to=[]), "'path'"),
    "unknown item": (change(*IMAGE, "type", to="video"), "messages[0].content[0]: "),
    "text of no text": (change("messages", 0, "content", 1, "text", to=3), "messages[0].content[1]: 'text'"),
    "empty answer": (change("messages", 1, "content", to=" "), "messages[1]: "),
    "scan of the assistant": (
        change("messages", 1, "content", to=[{"type": "image", "modality": "T1", "path": "a"}]),
        "messages[1]: a scan",
    ),
    "value is no option": (change("answer", "value", to="x"), "answer.value 'x'"),
    "options that are one answer": (
        change("answer", "options", to=["a", "b", "B."]),
        "answer.options is ['a', 'b', 'B.']",
    ),
    "one option": (change("answer", "options", to=["a"]), "answer.options is ['a']"),
    "number in quotes": (change("answer", to={"type": "number", "value": "41"}), "answer.value is '41'"),
    "truth value as number": (change("answer", to={"type": "number", "value": True}), "answer.value is True"),
    "unknown answer type": (change("answer", "type", to="bool"), "choice, number, text"),
}


@pytest.mark.parametrize(("mistake", "part"), MISTAKES.values(), ids=MISTAKES.keys())
def test_invalid_row_is_rejected_with_key_and_value(root, make_row, mistake, part):
    row = {**make_row("a", "T1"), "answer": {"type": "choice", "options": ["a", "b"], "value": "a"}}
    assert problems_of(row, root) == ""
    mistake(row)
    assert part in problems_of(row, root)


def test_all_problems_of_a_row_are_reported(root, make_row):
    row = make_row("a", "T3")
    del row["subject"]
    row["answer"] = {"type": "number", "value": float("inf")}
    assert len(problems_of(row, root).splitlines()) == 3


@pytest.mark.parametrize("row", [[], "text", None, 3])
def test_row_that_is_not_an_object_is_rejected(root, row):
    assert type(row).__name__ in problems_of(row, root)


@pytest.mark.parametrize(
    ("turn", "item", "key"),
    [({}, {"maskk": "m"}, "maskk"), ({}, {"text": "a"}, "text"), ({"reasoning_content": "a"}, {}, "reasoning_content")],
)  # fmt: skip
def test_key_of_a_turn_or_an_item_that_is_not_read_is_a_problem(root, make_row, turn, item, key):
    row = make_row("a", "T1")
    row["messages"][0]["content"][0] |= item
    row["messages"][1] |= turn
    problem = problems_of(row, root)
    assert repr(key) in problem
    assert "\n" not in problem


def test_keys_of_an_item_that_are_null_are_passed_over(root, make_row):
    row = make_row("a", "T1")
    row["messages"][0]["content"][0] |= {"text": None, "mask": None, "other": None}
    assert problems_of(row, root) == ""
