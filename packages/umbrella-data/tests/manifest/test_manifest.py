"""Manifests: random access by byte offsets; every problem is reported with its line."""

from __future__ import annotations

import json
import pickle

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest


def test_samples_are_read_by_index_slice_and_iteration(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row(name, "T1") for name in "abcd"]))
    assert len(manifest) == 4
    assert (manifest[2].id, manifest[-1].id) == ("c", "d")
    assert [sample.id for sample in manifest[1:3]] == ["b", "c"]
    assert [sample.id for sample in manifest] == list("abcd")
    with pytest.raises(IndexError):
        manifest[4]


def test_modalities_are_read_in_order_without_files(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "dwi", "T1w"), make_row("b"), make_row("c", "dMRI", "T1")]))
    assert [manifest.modalities(i) for i in (2, 1, 0, 2)] == [("dMRI", "T1"), (), ("dMRI", "T1"), ("dMRI", "T1")]


def test_modalities_of_an_invalid_row_raise_its_problems(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "T1"), {"messages": [{"content": 3}]}]))
    with pytest.raises(ManifestError, match="line 2: 'id'"):
        manifest.modalities(1)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\n", ""])
def test_any_line_ending_is_read(make_row, tmp_path, end):
    separator = end or "\n"
    text = separator.join(json.dumps(make_row(name, "T1", question="脳?")) for name in "abc") + end
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == list("abc")
    assert manifest.line(2) == (7 if end == "\n\n\n" else 3)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_is_indexed_by_its_elements(make_row, tmp_path, indent):
    rows = [make_row(name, "T1", question="脳?") for name in "abc"]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == list("abc")
    assert [sample.messages[0].text for sample in manifest] == ["脳?"] * 3
    lines = path.read_text(encoding="utf-8").splitlines()
    start = manifest.line(1) - 1
    assert '"id": "b"' in "\n".join(lines[start : start + 2])


def test_json_file_of_one_object_is_one_row(make_row, tmp_path):
    path = tmp_path / "row.json"
    path.write_text("\n" + json.dumps(make_row("a", "T1"), indent=1) + "\n")
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == ["a"]
    assert manifest.line(0) == 2


@pytest.mark.parametrize(
    "text", ['{"id": 1}\n{"id": 2}', "3", '[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"b": 2}]', '[{"a": 1}] x']
)
def test_invalid_json_list_is_rejected(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match=r"rows\.json"):
        read_manifest(path)


def test_validate_reports_all_problems_of_all_rows_with_their_lines(make_row, write_manifest, tmp_path):
    rows = [make_row("a", "T1"), make_row("b", "T9"), make_row("a", "T1"), {"id": "x", "messages": 3}]
    path = write_manifest(rows)
    path.write_text(path.read_text() + '{"id": NaN}\nnot json\n')
    (tmp_path / "a_0.nii.gz").touch()
    with pytest.raises(ManifestError) as caught:
        read_manifest(path).validate()
    starts = [
        "line 2: messages[0].content[0]: unknown modality 'T9'",
        "line 3: duplicate id 'a'",
        "line 4: 'subject'",
        "line 4: 'messages'",
        "line 5: NaN",
        "line 6: ",
    ]
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)
    assert str(path) in str(caught.value)


def canonical(user: object, **more: object) -> str:
    """A canonical row with this content of the user's turn."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "a"}]
    return json.dumps({"id": "a", "subject": "s", "messages": turns, **more})


def llava(text: str) -> str:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]
    return json.dumps({"id": "a", "image": "a.nii", "modality": "T1", "conversations": turns})


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# Rows that JSON readers accept, or fail on with an error of their own, and a part of the message.
ODD_ROWS = {
    "nested_row": (nested(100_000), "nested"),
    "nested_object": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
    "nested_extra_key": (canonical("q", extra=0).replace("0}", nested(100_000) + "}"), "nested"),
    "surrogate_in_text": (canonical("half \ud800 of it"), "surrogate"),
    "surrogate_in_upper_case": (canonical("q").replace('"q"', '"\\uDC00"'), "surrogate"),
    "surrogates_in_wrong_order": (canonical("\udc00\ud800"), "surrogate"),
    "surrogate_in_id": (canonical("q", id="\udfff"), "surrogate"),
    "surrogate_in_subject": (canonical("q", subject="s\ud834"), "surrogate"),
    "surrogate_in_path": (canonical([{"type": "image", "modality": "T1", "path": "\ud800.nii"}]), "surrogate"),
    "surrogate_in_a_key": (canonical("q", **{"\ud800": 1}), "surrogate"),
    "surrogate_in_llava": (llava("<image> \ud800"), "surrogate"),
    "key_twice": (canonical("q").replace('"id": "a"', '"id": "a", "id": "b"'), "'id' more than once"),
    "key_twice_with_one_value": (canonical("q").replace('"id": "a"', '"id": "a", "id": "a"'), "'id' more than once"),
    "key_twice_in_a_turn": (canonical("q").replace('"content": "q"', '"content": "q", "content": "r"'), "'content'"),
    "key_twice_in_llava": (llava("<image>q").replace('"modality"', '"image": "b.nii", "modality"'), "'image'"),
    "key_twice_in_answer": (
        canonical("q", images=[], answer='{"type": "text", "type": "number", "value": 1}'),
        "'type' more than once",
    ),
    "image_token": (canonical("<image>\nWhat is it?"), "messages[0].content[0]: a text contains '<image>'"),
    "image_token_of_a_modality": (canonical("an <image_sMRI> here"), "'<image_sMRI>'"),
    "image_token_of_a_tokenizer": (canonical("<|image_pad|>"), "'<|image_pad|>'"),
    "image_token_next_to_a_scan": (
        canonical([{"type": "image", "modality": "T1", "path": "a.nii"}, {"type": "text", "text": "<image>"}]),
        "messages[0].content[1]: ",
    ),
    "image_token_of_the_assistant": (canonical("q").replace('"a"}]', '"it is <image>"}]'), "messages[1].content[0]: "),
    "number_of_many_digits": (canonical("q", answer={"type": "number", "value": 10**400}), "answer.value"),
    "number_of_too_many_digits": (canonical("q", extra=0).replace("0}", "9" * 5000 + "}"), "digits"),
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_row_is_rejected_with_its_line(tmp_path, name, ending):
    text, part = ODD_ROWS[name]
    path = tmp_path / f"rows.{ending}"
    rows = [canonical("is it <b>bold</b>?"), text, canonical("\U0001f9e0 < image >", id="c")]
    path.write_text("\n".join(rows) if ending == "jsonl" else "[" + ",\n".join(rows) + "]")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path).validate()
    (problem,) = caught.value.problems
    assert problem.startswith("line 2: ")
    assert part in problem
    str(caught.value).encode("utf-8")  # can be printed
    with pytest.raises(ManifestError):
        read_manifest(path)[1]


def test_all_odd_rows_are_reported_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(text for text, _ in ODD_ROWS.values()))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path).validate()
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"line {number}" for number in range(1, len(ODD_ROWS) + 1)
    ]


@pytest.mark.parametrize("depth", [50, 300, 450, 480, 900, 950, 970, 980, 990])
@pytest.mark.parametrize("key", ["messages", "content", "path", "image_path", "extra"])
def test_nested_row_is_read_or_rejected_with_its_line(tmp_path, depth, key):
    values = {
        "messages": canonical("q").replace('"messages": [', '"messages": ["X", '),
        "content": canonical(["X"]),
        "path": canonical([{"type": "image", "modality": "T1", "path": "X"}]),
        "image_path": canonical([{"type": "image", "modality": "T1", "image_path": "X"}]).replace(
            "messages", "conversations"
        ),
        "extra": canonical("q", extra="X"),
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(values[key].replace('"X"', nested(depth)))
    manifest = read_manifest(path)
    for read in (manifest.validate, lambda: manifest.facts, lambda: manifest.turns(0)):
        try:
            read()
            problem = "line 1: "
        except ManifestError as error:
            problem = error.problems[0]
        assert problem.startswith("line 1: ")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_manifest_is_rejected(tmp_path, ending, encoding):
    path = tmp_path / f"rows.{ending}"
    path.write_text(canonical("q"), encoding=encoding)
    with pytest.raises(ManifestError, match="UTF-8") as caught:
        read_manifest(path)
    assert caught.value.problems[0].startswith("line 1: ")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_bytes_that_are_not_utf_8_are_rejected_with_their_line(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    rows = [canonical("q"), canonical("na\u00efve", id="b").replace("\\u00ef", "\u00ef")]
    path.write_text("\n".join(rows) if ending == "jsonl" else "[" + ",\n".join(rows) + "]", encoding="latin-1")
    with pytest.raises(ManifestError, match="UTF-8") as caught:
        read_manifest(path).validate(check_files=False)
    assert caught.value.problems[0].startswith("line 2: ")


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n", "download"),
    ],
)
def test_look_alike_of_a_manifest_is_named(tmp_path, start, advice):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start)
    with pytest.raises(ManifestError, match=advice):
        read_manifest(path)


def test_characters_in_surrogate_pairs_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(canonical("\U0001f9e0?"))
    assert "\\ud83e" in path.read_text()
    assert read_manifest(path)[0].messages[0].text == "\U0001f9e0?"


def test_rows_that_end_with_the_user_are_valid_only_if_asked_for(make_row, write_manifest):
    row = make_row("a", "T1")
    del row["messages"][-1]
    path = write_manifest([row])
    with pytest.raises(ManifestError, match="line 1: roles are user"):
        read_manifest(path).validate(check_files=False)
    with pytest.raises(ManifestError, match="line 1: roles are user"):
        read_manifest(path).turns(0)
    manifest = read_manifest(path, may_end_with_user=True)
    manifest.validate(check_files=False)
    assert [turn.role for turn in manifest[0].messages] == [turn.role for turn in manifest.turns(0)] == ["user"]
    assert manifest.modalities(0) == ("T1",)


def test_validate_reports_a_missing_file_or_a_broken_link(make_row, write_manifest, tmp_path):
    manifest = read_manifest(write_manifest([make_row("a", "T1")]))
    manifest.validate(check_files=False)
    with pytest.raises(ManifestError, match=r"line 1: subject 'sub-a': no file a_0\.nii\.gz under .*data_root"):
        manifest.validate()
    (tmp_path / "a_0.nii.gz").symlink_to("nothing")
    with pytest.raises(ManifestError) as caught:
        manifest.validate()
    (problem,) = caught.value.problems
    assert problem.startswith("line 1: subject 'sub-a': a_0.nii.gz: a link ")
    assert "data_root" not in problem
    (tmp_path / "nothing").touch()
    manifest.validate()


def test_paths_are_relative_to_data_root(make_row, write_manifest, tmp_path):
    root = tmp_path / "scans"
    root.mkdir()
    manifest = read_manifest(write_manifest([make_row("a", "T1")]), data_root=root)
    assert manifest[0].scans[0].paths == (root / "a_0.nii.gz",)
    with pytest.raises(ManifestError, match="data_root"):
        read_manifest(manifest.path, data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_manifest_without_rows_is_rejected(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(path)


def test_missing_manifest_is_rejected(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ManifestError, match=r"rows\.jsonl"):
        read_manifest(path)
    path.symlink_to(".git/annex/objects/K/K")
    with pytest.raises(ManifestError, match="datalad get"):
        read_manifest(path)


def test_manifest_can_be_pickled(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "T1")]))
    assert manifest[0] == pickle.loads(pickle.dumps(manifest))[0]


def test_selected_rows_keep_lines_facts_and_order(make_row, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [make_row("a", "T1"), make_row("b", "dMRI"), make_row("c"), make_row("d", "T1")]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    part = read_manifest(path).select([3, 1])
    assert [sample.id for sample in part] == ["d", "b"]
    assert [part.line(row) for row in range(2)] == [7, 3]
    assert [part.modalities(row) for row in range(2)] == [("T1",), ("dMRI",)]
    assert [turn.role for turn in part.turns(1)] == ["user", "assistant"]
    assert part.facts.modality_sets() == {frozenset({"T1"}), frozenset({"dMRI"})}
    assert [part.facts.modalities(row) for row in range(2)] == [("T1",), ("dMRI",)]
    assert len(part.whole) == 4
    again = pickle.loads(pickle.dumps(part.select([1])))
    assert ([sample.id for sample in again], again.rows.tolist(), len(again.whole)) == (["b"], [1], 4)
    assert (read_manifest(path).rows, len(part.select([]))) == (None, 0)


def test_selected_rows_alone_are_validated(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a"), {"id": 3}, make_row("c")]))
    manifest.select([2, 0]).validate()
    with pytest.raises(ManifestError, match="line 2"):
        manifest.select([0, 1]).validate()
    for rows in ([3], [-1], [0, 5]):
        with pytest.raises(IndexError):
            manifest.select(rows)
