"""Rows of other dialects are converted to the same samples as canonical ones."""

from __future__ import annotations

import copy
import json

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.manifest.sample import Scan, Turn


@pytest.fixture
def read(write_manifest):
    def read_row(row, **options):
        return read_manifest(write_manifest([row]), **options)[0]

    return read_row


@pytest.fixture
def root(tmp_path):
    return tmp_path.resolve()


LLAVA = {
    "id": "row-1",
    "image": "sub-01/anat/sub-01_T1w.nii.gz",
    "modality": "sMRI",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a brain"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def test_llava_row_is_read(read, root):
    sample = read(LLAVA)
    scan = Scan("T1", (root / "sub-01/anat/sub-01_T1w.nii.gz",))
    assert sample.messages == (
        Turn("user", (scan, "What is it?")),
        Turn("assistant", ("a brain",)),
        Turn("user", ("Sure?",)),
        Turn("assistant", ("yes",)),
    )
    assert (sample.id, sample.subject, sample.answer) == ("row-1", "sub-01", None)


def test_llava_row_with_modality_paths_has_scans_at_its_placeholders(read, root):
    row = {
        "id": "row-1",
        "subject": "s1",
        "modality_paths": {"T1": "t1.nii.gz", "fMRI": ["rest1.nii.gz", "rest2.nii.gz"], "DTI": ["fa.nii", "md.nii"]},
        "conversations": [
            {"from": "human", "value": "One: <image> two: <image_rsfMRI>\n<image>and <image_dMRI>?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    sample = read(row)
    assert sample.messages[0].content == (
        "One:",
        Scan("T1", (root / "t1.nii.gz",)),
        "two:",
        Scan("rsfMRI", (root / "rest1.nii.gz",)),
        Scan("rsfMRI", (root / "rest2.nii.gz",)),
        "and",
        Scan("dMRI", (root / "fa.nii", root / "md.nii")),
        "?",
    )


def test_llava_row_without_placeholders_starts_with_its_scans(read):
    row = copy.deepcopy(LLAVA)
    row["conversations"][0]["value"] = "What is it?"
    assert read(row).messages == read(LLAVA).messages


UMBRELLA = {
    "task_id": "B_same_sex_comparison",
    "task_type": "T3",
    "subject_ids": ["A", "B"],
    "modalities": ["sMRI", "sMRI"],
    "images": [
        {"path": "scans/A.nii.gz", "token": "<image>", "modality": "sMRI"},
        {"path": "scans/B.nii.gz", "token": "<image>", "modality": "sMRI"},
    ],
    "conversations": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "This is the reference."},
                {"type": "image", "modality": "sMRI", "image_path": "scans/A.nii.gz"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Ready."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare."},
                {"type": "image", "modality": "sMRI", "image_path": "scans/B.nii.gz"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The same sex."}]},
    ],
    "metadata": {"subject_id": "B", "subject_label": "male", "task": "sex_via_comparison"},
}


def test_umbrella_row_of_a_comparison_is_read(read, root):
    sample = read(UMBRELLA)
    assert [turn.content for turn in sample.messages] == [
        ("This is the reference.", Scan("T1", (root / "scans/A.nii.gz",))),
        ("Ready.",),
        ("Compare.", Scan("T1", (root / "scans/B.nii.gz",))),
        ("The same sex.",),
    ]
    assert (sample.id, sample.subject, sample.task) == ("B_same_sex_comparison", "B", "sex_via_comparison")


def test_umbrella_row_of_the_first_version_is_read(read):
    row = copy.deepcopy(UMBRELLA)
    row["conversation"] = row.pop("conversations")
    for turn in row["conversation"]:
        for item in turn["content"]:
            if item["type"] == "image":
                del item["modality"]
                item["type"] = "image_sMRI"
    assert read(row).messages == read(UMBRELLA).messages


def test_umbrella_row_of_texts_has_the_scans_of_its_list(read):
    row = copy.deepcopy(UMBRELLA)
    for turn in row["conversations"]:
        turn["content"] = " ".join(item.get("text", "<image>") for item in turn["content"])
    assert read(row).messages == read(UMBRELLA).messages


HUGGING_FACE = {
    "id": "row-1",
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ],
    "images": ["sub-7/anat/sub-7_T1w.nii.gz", {"path": "sub-7/func/sub-7_task-rest_bold.nii.gz", "bytes": None}],
}


def test_hugging_face_row_is_read_with_modalities_by_bids_suffix(read, root):
    sample = read(HUGGING_FACE)
    assert sample.messages[0].content == (
        Scan("T1", (root / "sub-7/anat/sub-7_T1w.nii.gz",)),
        "And",
        Scan("rsfMRI", (root / "sub-7/func/sub-7_task-rest_bold.nii.gz",)),
    )
    assert sample.subject == "sub-7"


def test_hugging_face_row_of_texts_with_placeholders_is_read(read):
    row = copy.deepcopy(HUGGING_FACE)
    row["messages"] = [
        {"role": "user", "content": "<image>And <image>"},
        {"role": "assistant", "content": "two"},
    ]
    assert read(row).messages == read(HUGGING_FACE).messages


def test_hugging_face_row_with_declared_modalities_needs_no_bids_names(read):
    row = {**HUGGING_FACE, "images": ["a.nii", "b.nii"], "modalities": ["T1", "bold"]}
    assert read(row).modalities == ("T1", "rsfMRI")


def test_answer_of_a_llava_row_is_read(read):
    answer = {"type": "choice", "options": ["a brain", "a heart"], "value": "a brain"}
    assert read({**LLAVA, "answer": answer}).answer.value == "a brain"


def test_row_without_an_id_gets_a_hash_of_its_content(read):
    row = {key: value for key, value in HUGGING_FACE.items() if key != "id"}
    first, other = read(row), read({**row, "subject": "x"})
    assert len(first.id) == 16
    assert first.id == read(row).id != other.id


def test_subject_without_a_bids_name_is_the_file_name(read):
    assert read({**LLAVA, "image": "t1/NDAR123.nii.gz"}).subject == "NDAR123"


def test_absolute_path_is_accepted_inside_of_the_root_except_in_canonical_rows(read, root, make_row):
    inside = {**LLAVA, "image": f"{root}/a.nii.gz"}
    assert read(inside).scans[0].paths == (root / "a.nii.gz",)
    for outside in ("/elsewhere/a.nii.gz", f"{root}/../a.nii.gz", f"{root}x/a.nii.gz"):
        with pytest.raises(ManifestError, match="path"):
            read({**LLAVA, "image": outside})
    canonical = make_row("a", "T1")
    canonical["messages"][0]["content"][0]["path"] = f"{root}/a.nii.gz"
    with pytest.raises(ManifestError, match="absolute"):
        read(canonical)


MISTAKES = {
    "no known key": ({"prompt": "x", "image": "a"}, r"\(prompt, image\)"),
    "more placeholders than scans": ({**LLAVA, "image": []}, "1 image placeholders.* 0 scans"),
    "more scans than placeholders": ({**LLAVA, "image": ["a.nii", "b.nii"]}, "1 image placeholders.* 2 scans"),
    "no modality": ({**LLAVA, "modality": None, "image": "a.nii"}, r"a\.nii.*'modality'"),
    "too many modalities": ({**LLAVA, "modality": ["T1", "T1"]}, "1 images, but 2 modalities"),
    "image without a file": ({**HUGGING_FACE, "images": [{"bytes": "x"}, "b"]}, "without a path"),
    "unknown role": (
        {**LLAVA, "conversations": [{"from": "nobody", "value": "<image>"}, LLAVA["conversations"][1]]},
        "role of system, user, assistant",
    ),
    "placeholder of another modality": (
        {**LLAVA, "conversations": [{"from": "human", "value": "<image_fMRI>?"}, LLAVA["conversations"][1]]},
        "fMRI.* is sMRI",
    ),
    "no turns": ({**HUGGING_FACE, "messages": []}, "'messages'"),
    "item of no known type": (
        {
            **HUGGING_FACE,
            "images": [],
            "messages": [{"role": "user", "content": [3]}, {"role": "assistant", "content": "x"}],
        },
        r"messages\[0\]\.content\[0\]",
    ),
}


def test_error_about_an_unknown_dialect_shows_valid_rows(read):
    with pytest.raises(ManifestError) as caught:
        read({"prompt": "x"})
    shown = str(caught.value).partition("as in ")[2]
    for text in shown.replace("<image>...", "<image>").replace("...", '"a"').split(" or "):
        assert read(json.loads(text)).modalities == ("T1",)


@pytest.mark.parametrize(("row", "part"), MISTAKES.values(), ids=MISTAKES.keys())
def test_invalid_row_is_rejected_with_its_line(read, row, part):
    with pytest.raises(ManifestError, match=f"line 1: .*{part}"):
        read(row)


@pytest.mark.parametrize("row", [LLAVA, UMBRELLA, HUGGING_FACE], ids=["LLaVA", "UMBRELLA", "HF"])
def test_modalities_of_other_dialects_are_read_without_files(write_manifest, row):
    manifest = read_manifest(write_manifest([row]))
    assert manifest.modalities(0) == manifest[0].modalities


def test_dialects_may_mix_in_one_manifest(write_manifest, make_row):
    manifest = read_manifest(write_manifest([LLAVA, make_row("a", "dMRI"), UMBRELLA]))
    assert [manifest.modalities(i) for i in range(3)] == [("T1",), ("dMRI",), ("T1", "T1")]


def parts_of(value, path=()):
    """The path to every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from parts_of(child, (*path, key))


JUNK = [None, True, 3, 1.5, "", "x", "<image>", [], {}, [[]], [{}], ["a", None], {"path": 3}, {"type": "image"}]


@pytest.mark.parametrize("row", [LLAVA, UMBRELLA, HUGGING_FACE], ids=["LLaVA", "UMBRELLA", "HF"])
def test_row_with_any_part_replaced_is_read_or_rejected(write_manifest, row):
    rows = []
    for path in parts_of(row):
        for junk in JUNK:
            changed = holder = {"row": copy.deepcopy(row)}
            for key in ("row", *path)[:-1]:
                holder = holder[key]
            holder[("row", *path)[-1]] = junk
            rows.append(changed["row"])
    manifest = read_manifest(write_manifest(rows))
    assert len(manifest) == len(rows)
    problems = []
    for i in range(len(manifest)):
        try:
            assert manifest[i].modalities == manifest.modalities(i)
        except ManifestError as error:
            problems.append((i, error.problems[0]))
    assert all(problem.startswith(f"line {i + 1}: ") for i, problem in problems)
    assert 10 < len(problems) < len(rows) - 10
