"""Each rule of the selection changes the rows of a BIDS tree by one kind of scan."""

from __future__ import annotations

import json

import pytest

from umbrella_data.bids.derivatives import choose_versions
from umbrella_data.bids.selection import OPTIONS, Selection, select_scans
from umbrella_data.cli import main
from umbrella_data.errors import ManifestError

PLAIN = {
    "sub-01/ses-01/anat/sub-01_ses-01_T1w",
    "sub-01/ses-01/func/sub-01_ses-01_task-rest_run-01_bold",
    "sub-01/ses-01/func/sub-01_ses-01_task-RestEyesOpen_bold",
    "sub-02/ses-02/anat/sub-02_ses-02_acq-highres_T1w",
    "sub-02/ses-02/anat/sub-02_ses-02_UNIT1",
    "sub-02/ses-02/dwi/sub-02_ses-02_dwi",
}
ECHOES = {f"sub-02/ses-02/func/sub-02_ses-02_task-rest_run-02_echo-{echo}_bold" for echo in (1, 2, 3)}
MIDDLE = "sub-02/ses-02/func/sub-02_ses-02_task-rest_run-02_echo-2_bold"
NBACK = "sub-01/ses-01/func/sub-01_ses-01_task-nback_bold"
NO_TASK = "sub-01/ses-01/func/sub-01_ses-01_bold"
CONTRAST = "sub-01/ses-01/anat/sub-01_ses-01_ce-gad_T1w"
NORM = "sub-01/ses-01/anat/sub-01_ses-01_rec-norm_T1w"
INVERSION = "sub-02/ses-02/anat/sub-02_ses-02_inv-1_T1w"
DEFAULT = PLAIN | {MIDDLE}
REST = {path for path in DEFAULT if "_task-rest_" in path}
SERIES = {path for path in DEFAULT if "_bold" in path}
T1 = {path for path in DEFAULT if "/anat/" in path}
DWI = DEFAULT - SERIES - T1


@pytest.fixture
def tree(tmp_path):
    for path in (*PLAIN, *ECHOES, NBACK, NO_TASK, CONTRAST, NORM, INVERSION):
        file = tmp_path / "bids" / f"{path}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "bids"


def select(tree, **options):
    modalities = options.pop("modalities", None)
    listing = choose_versions(select_scans(tree, Selection(**options), modalities=modalities))
    return {scan.path.removesuffix(".nii.gz") for scan in listing.scans}, listing.messages


def counts(messages, word):
    """What the only message with a word counts."""
    (message,) = (message for message in messages if word in message)
    return message.rpartition(": ")[2]


def test_default_takes_rest_and_counts_the_others_by_reason(tree):
    paths, messages = select(tree)
    assert paths == DEFAULT
    assert counts(messages, "--task") == "1 task-nback, 1 without task"
    assert counts(messages, "--contrast") == "1 ce-gad"
    assert counts(messages, "--echo") == "1 echo-1, 1 echo-3"
    assert counts(messages, "--reconstruction") == "1 rec-norm"
    assert counts(messages, "inversion") == "1 inv-1"
    assert counts(messages, "taken as T1") == "1 UNIT1"
    assert len(messages) == 6


@pytest.mark.parametrize(
    ("option", "labels", "expected"),
    [
        ("task", ["nback"], (DEFAULT - SERIES) | {NBACK}),
        ("task", ["task-nback", "rest"], (DEFAULT - SERIES) | REST | {NBACK}),
        ("task", ["*"], DEFAULT | {NBACK}),
        ("session", ["01"], {path for path in DEFAULT if "ses-01" in path}),
        ("session", ["ses-02"], {path for path in DEFAULT if "ses-02" in path}),
        ("run", ["1"], (DEFAULT - SERIES) | {path for path in SERIES if "run-01" in path}),
        ("run", ["run-02"], (DEFAULT - SERIES) | {MIDDLE}),
        ("acquisition", ["highres"], (DEFAULT - T1) | {path for path in T1 if "acq-highres" in path}),
        ("echo", ["3"], (DEFAULT - SERIES) | {path for path in ECHOES if "echo-3" in path}),
        ("echo", ["2", "3"], (DEFAULT - SERIES) | {MIDDLE}),
        ("reconstruction", ["norm"], (DEFAULT - T1) | {NORM}),
        ("contrast", ["ce-gad"], (DEFAULT - T1) | {CONTRAST}),
    ],
)
def test_option_changes_the_scans_of_modalities_with_its_entity(tree, option, labels, expected):
    paths, messages = select(tree, labels={option: labels})
    assert paths == expected
    assert any(f"by --{option}" in message for message in messages)


def test_labels_are_equal_as_numbers_for_run_and_echo_only(tree):
    assert select(tree, labels={"run": ["01"]})[0] == select(tree, labels={"run": ["001"]})[0]
    with pytest.raises(ManifestError, match="ses-1;"):
        select(tree, labels={"session": ["1"]})


def test_label_that_no_scan_has_is_an_error_with_those_that_exist(tree):
    wrong = {option: ["x"] for option in OPTIONS}
    with pytest.raises(ManifestError) as caught:
        select(tree, labels=wrong, modalities=["T1"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [f"--{option}" for option in OPTIONS]
    assert "task-RestEyesOpen, task-nback, task-rest" in caught.value.problems[0]
    assert (caught.value.path, "acq-highres" in caught.value.problems[3]) == (str(tree), True)
    paths, messages = select(tree, labels={"task": ["rest", "tset"]})
    assert paths == (DEFAULT - SERIES) | REST
    assert any("--task" in message and "task-tset;" in message for message in messages)
    # Labels of a modality that is left out are no error.
    assert select(tree, labels={"task": ["rest"]}, modalities=["T1"])[0] == T1


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"bold": {"task": "nback"}}, (DEFAULT - SERIES) | {NBACK}),
        ({"bold": {"task": None}}, (DEFAULT - SERIES) | {NO_TASK}),
        ({"bold": {"run": 2}}, (DEFAULT - SERIES) | {MIDDLE}),
        ({"bold": {"echo": [1, None]}}, (DEFAULT - {MIDDLE}) | {path for path in ECHOES if "echo-1" in path}),
        ({"bold": {"run": "Query.ANY"}}, (DEFAULT - SERIES) | REST),
        ({"t1w": {"acquisition": None}}, {path for path in DEFAULT if "acq-" not in path}),
        ({"t1w": {"suffix": "T1w"}}, {path for path in DEFAULT if "UNIT1" not in path}),
        ({"t1w": {"ceagent": ["gad", None]}}, DEFAULT | {CONTRAST}),
        ({"t1w": {"reconstruction": "*"}}, (DEFAULT - T1) | {NORM}),
        ({"t1w": {"session": "02", "datatype": "anat"}}, (DEFAULT - T1) | {path for path in T1 if "ses-02" in path}),
        ({"t1w": {"inv": "1"}}, (DEFAULT - T1) | {INVERSION}),
        ({"dwi": {"extension": ".nii"}}, DEFAULT - DWI),
        ({"dwi": {"extension": [".nii", ".nii.gz"]}, "flair": {}}, DEFAULT),
        ({"flair": {"session": "09"}}, DEFAULT),
    ],
)  # fmt: skip
def test_query_of_a_filter_file_changes_the_scans_of_its_modality(tree, tmp_path, query, expected):
    file = tmp_path / "filter.json"
    file.write_text(json.dumps(query))
    paths, messages = select(tree, filter_file=file)
    assert paths == expected
    is_named = any("--filter" in message or "flair" in message for message in messages)
    assert is_named == (expected != DEFAULT | {CONTRAST})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sub-01", {path for path in DEFAULT if not path.startswith("sub-01")}),
        ("sub-02/", {path for path in DEFAULT if not path.startswith("sub-02")}),
        ("sub-01/ses-01", {path for path in DEFAULT if not path.startswith("sub-01")}),
        ("sub-02_ses-02", {path for path in DEFAULT if not path.startswith("sub-02")}),
        (f"./{MIDDLE}.nii.gz", (DEFAULT - {MIDDLE}) | {path for path in ECHOES if "echo-1" in path}),
        ("sub-02_ses-02_dwi", DEFAULT - DWI),
        ("sub-02_ses-02_dwi.nii.gz", DEFAULT - DWI),
    ],
)
def test_line_of_the_list_of_excluded_scans_leaves_them_out(tree, tmp_path, line, expected):
    file = tmp_path / "exclude.txt"
    file.write_text(f"{line}\n")
    paths, messages = select(tree, exclude_file=file)
    assert paths == expected
    assert counts(messages, "--exclude")
    assert not any("exclude.txt" in message for message in messages)


def test_lines_of_the_list_that_name_no_scan_are_reported(tree, tmp_path):
    file = tmp_path / "exclude.txt"
    file.write_text("sub-0\nsub-01\nsub-01/ses-02\n")
    paths, messages = select(tree, exclude_file=file, modalities=["dMRI"])
    assert paths == DWI
    assert counts(messages, "exclude.txt") == "2 (sub-0, sub-01/ses-02)"


def test_each_option_of_the_command_changes_the_rows(nifti, random_voxels, tmp_path, capsys):
    names = ["acq-a_rec-x_ce-gad_run-1_echo-1_T1w", "T1w", "task-rest_bold", "task-nback_bold"]
    for name in names:
        is_series = name.endswith("bold")
        path = f"bids/sub-01/ses-01/{'func' if is_series else 'anat'}/sub-01_ses-01_{name}.NII"
        nifti.write(random_voxels(4, 5, 6, 3) if is_series else random_voxels(4, 5, 6), path.replace("NII", "nii"))
        (tmp_path / path.replace("NII", "nii")).rename(tmp_path / path)
    (tmp_path / "filter.json").write_text('{"bold": {"task": "nback"}}')
    (tmp_path / "exclude.txt").write_text("sub-01_ses-01_T1w\n")
    words = ["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path), "--test-fraction", "0", "--workers", "1"]

    def rows(*options):
        assert main([*words, *options]) == 0
        lines = (tmp_path / "train.jsonl").read_text().splitlines()
        images = [json.loads(line)["messages"][0]["content"][0]["path"] for line in lines]
        return {path.rpartition("/")[2].removeprefix("sub-01_ses-01_").removesuffix(".NII") for path in images}

    assert rows() == {"T1w", "task-rest_bold"}
    assert "note: series of other tasks" in capsys.readouterr().out
    assert rows("--session", "01") == {"T1w", "task-rest_bold"}
    assert rows("--contrast", "gad") == {names[0], "task-rest_bold"}
    for option in ("--acquisition=a", "--reconstruction=x", "--run=1", "--echo=1"):
        assert rows(option, "--contrast", "gad", "--task", "nback") == {names[0], "task-nback_bold"}
    for option in ("--acquisition=a", "--reconstruction=x", "--run=1", "--echo=1"):
        assert rows(option) == {"task-rest_bold"}
    assert rows("--filter", str(tmp_path / "filter.json")) == {"T1w", "task-nback_bold"}
    assert rows("--exclude", str(tmp_path / "exclude.txt")) == {"task-rest_bold"}
    capsys.readouterr()
    assert main([*words, "--task", "rset"]) == 1
    assert "task-nback, task-rest" in capsys.readouterr().err
