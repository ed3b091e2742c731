"""Canonical rows are read strictly: every problem of a row is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbrella_data.manifest.sample import Answer, Scan, Turn, parse_row, resolve_inside


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


def test_modality_when_an_alias_is_resolved_and_maps_are_a_list(root, make_row):
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
    "subject is a number": (change("subject", to=12), "'subject' is 12; it must be a text"),
    "empty id": (change("id", to=" "), "'id'"),
    "misspelt key": (change("anwser", to={}), "did you mean 'answer'"),
    "no messages": (change("messages", to=[]), "'messages' must be a list"),
    "unknown role": (change("messages", 0, "role", to="human"), r"messages[0] must be an object with a role"),
    "two users": (change("messages", 1, "role", to="user"), "roles are user, user"),
    "user last": (change("messages", slice(1, 2), to=[]), "assistant last"),
    "scan without modality": (change(*IMAGE, "modality", to=None), "'modality' declared"),
    "unknown modality": (change(*IMAGE, "modality", to="rsfMR"), "did you mean 'rsfMRI'"),
    "no path": (change(*IMAGE, "path", to=[]), "'path'"),
    "unknown item": (change(*IMAGE, "type", to="video"), "of type image or text"),
    "text of no text": (change("messages", 0, "content", 1, "text", to=3), "'text' must be a text"),
    "empty answer": (change("messages", 1, "content", to=" "), "says nothing"),
    "scan of the assistant": (
        change("messages", 1, "content", to=[{"type": "image", "modality": "T1", "path": "a"}]),
        "scans belong to user turns",
    ),
    "value is no option": (change("answer", "value", to="x"), "'x' is none of its options: a, b"),
    "one option": (change("answer", "options", to=["a"]), "two or more"),
    "number in quotes": (change("answer", to={"type": "number", "value": "41"}), "not in quotes"),
    "truth value as number": (change("answer", to={"type": "number", "value": True}), "must be finite"),
    "unknown answer type": (change("answer", "type", to="bool"), "choice, number, text"),
}


@pytest.mark.parametrize(("mistake", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_row_with_a_mistake_is_rejected_with_a_message(root, make_row, mistake, words):
    row = {**make_row("a", "T1"), "answer": {"type": "choice", "options": ["a", "b"], "value": "a"}}
    assert problems_of(row, root) == ""
    mistake(row)
    assert words in problems_of(row, root)


def test_row_with_many_mistakes_names_all(root, make_row):
    row = make_row("a", "T3")
    del row["subject"]
    row["answer"] = {"type": "number", "value": float("inf")}
    assert len(problems_of(row, root).splitlines()) == 3


@pytest.mark.parametrize("row", [[], "text", None, 3])
def test_row_when_no_object_is_rejected(root, row):
    assert "must be an object" in problems_of(row, root)


@pytest.mark.parametrize(
    "text",
    ["../a", "a/../../b", "a/../b", "/etc/passwd", "~/a", "C:/a", "a\\..\\b", "", " a", "a\x00b", "a\nb", "\udcff"],
)
def test_path_when_it_could_leave_the_root_is_rejected(root, text):
    with pytest.raises(ValueError, match="path"):
        resolve_inside(text, root=root)


def test_path_when_a_link_leads_out_is_rejected(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "scan.nii").touch()
    (root / "folder").symlink_to(outside)
    (root / "inner").mkdir()
    (root / "link.nii").symlink_to(root / "inner")
    with pytest.raises(ValueError, match="leads out"):
        resolve_inside("folder/scan.nii", root=root)
    assert resolve_inside("link.nii", root=root) == root / "link.nii"


def test_path_when_dots_are_in_names_is_kept(root):
    assert resolve_inside("a..b/c.nii.gz", root=root) == Path(root / "a..b/c.nii.gz")
