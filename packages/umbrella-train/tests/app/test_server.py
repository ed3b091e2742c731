"""The server of umbrella-app: the answers of umbrella-predict, no files that stay, and no requests from elsewhere."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import ScanReason
from umbrella_data.manifest.sample import Scan
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.app.server import HOST, read_question
from umbrella_train.app.session import PreparedScan, Session
from umbrella_train.assembly.predict import predict
from umbrella_train.errors import RunError

from .conftest import MAX_BYTES, NUM_TOKENS, App, wait_until

QUESTIONS = ("On which side is the lesion?", "How old is this person?")


@pytest.fixture(scope="module")
def scans(cohort: DemoCohort) -> Mapping[str, Mapping[str, Path]]:
    """Files of one subject by modality, with their names on the server."""
    ends = {
        "T1": {"scan.nii.gz": "anat/*_T1w.nii.gz"},
        "rsfMRI": {"scan.nii.gz": "func/*_bold.nii.gz", "scan.json": "func/*_bold.json"},
        "dMRI": {f"scan.{end}": f"dwi/*_dwi.{end}" for end in ("nii.gz", "bval", "bvec")},
    }
    folder = sorted(cohort.directory.glob("sub-*"))[0]
    return {
        modality: {name: next(folder.glob(pattern)) for name, pattern in files.items()}
        for modality, files in ends.items()
    }


@pytest.fixture
def t1(scans: Mapping[str, Mapping[str, Path]]) -> Mapping[str, Path]:
    return scans["T1"]


@pytest.mark.parametrize("modality", ["T1", "rsfMRI", "dMRI"])
def test_answers_are_those_of_predict(app: App, random_run: Path, scans: Any, modality: str) -> None:
    given = app.give(modality, scans[modality])
    assert given.status == 200, given.body
    shapes = {"T1": [1, 16, 16, 16], "rsfMRI": [1, 8, 8, 8, 8], "dMRI": [2, 8, 8, 8]}
    assert (given.json["shape"], given.json["warning"]) == (shapes[modality], None)
    scan = Scan(modality, (scans[modality]["scan.nii.gz"],))
    for question in QUESTIONS if modality == "T1" else QUESTIONS[:1]:
        expected = predict(random_run, question=question, scans=[scan], max_new_tokens=NUM_TOKENS, device="cpu")
        assert app.ask(given.json["key"], question).json == {"answer": expected}
    assert app.files() == []


def test_ready_maps_are_read_in_the_order_of_the_channels(app: App, random_run: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    maps = {"fa": random.uniform(0.1, 0.9, (12, 12, 12)), "md": random.uniform(5e-4, 1e-3, (12, 12, 12))}
    paths = []
    for name, values in maps.items():
        paths.append(tmp_path / f"{name}.nii")
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([2, 2, 2, 1])), paths[-1])
    given = app.give("dMRI", {"scan.nii": paths[0], "map-2.nii": paths[1]})
    assert given.status == 200, given.body
    scan = Scan("dMRI", tuple(paths))
    expected = predict(random_run, question="?", scans=[scan], max_new_tokens=NUM_TOKENS, device="cpu")
    assert app.ask(given.json["key"], "?").json == {"answer": expected}
    # The temporary folder is of no use to who reads the message.
    twice = app.give("dMRI", {"scan.nii": paths[0], "map-2.nii": paths[0]})
    assert (twice.status, twice.json["file"]) == (422, "map-2.nii")
    assert "as scan.nii, the map of FA" in twice.json["message"]
    # The other way round they are no FA and MD.
    swapped = app.give("dMRI", {"scan.nii": paths[1], "map-2.nii": paths[0]})
    assert (swapped.status, swapped.json["reason"]) == (422, "maps")


def test_a_mask_that_training_did_not_have_is_used_with_a_warning(
    app: App, random_run: Path, t1: Any, tmp_path: Path
) -> None:
    image = nib.load(t1["scan.nii.gz"])
    inside = np.zeros(image.shape, np.uint8)
    inside[8:-8, 8:-8, 8:-8] = 1
    nib.save(nib.Nifti1Image(inside, image.affine), tmp_path / "mask.nii.gz")
    given = app.give("T1", {**t1, "mask.nii.gz": tmp_path / "mask.nii.gz"})
    assert given.status == 200, given.body
    assert given.json["warning"].startswith("T1: ")
    scan = Scan("T1", (t1["scan.nii.gz"],), mask=tmp_path / "mask.nii.gz")
    expected = predict(random_run, question="?", scans=[scan], max_new_tokens=NUM_TOKENS, device="cpu")
    assert app.ask(given.json["key"], "?").json == {"answer": expected}
    assert b"Brain mask" in app.send("GET", f"scan/{given.json['key']}").body


def test_a_scan_whose_sides_are_a_guess_has_a_warning(app: App, t1: Any, tmp_path: Path) -> None:
    image = nib.load(t1["scan.nii.gz"])
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "scan.nii")
    given = app.give("T1", {"scan.nii": tmp_path / "scan.nii"})
    assert (given.status, given.json["warning"][:9]) == (200, "no_form: ")


def test_the_page_and_the_viewer_are_served_with_their_files(app: App, t1: Any) -> None:
    page = app.send("GET", "")
    assert page.status == 200
    assert b"the &lt;run&gt;" in page.body
    assert b"<run>" not in page.body
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert (page.headers["cache-control"], page.headers["referrer-policy"]) == ("no-store", "same-origin")
    assert [app.send("GET", name).status for name in ("app.js", "app.css", "viewer.js", "app.py")] == [200] * 3 + [404]
    viewer = app.send("GET", f"scan/{app.give('T1', t1).json['key']}")
    assert b'class="scan-viewer" open' in viewer.body


@pytest.mark.parametrize(
    "changed",
    [
        {"token": "other"},
        {"token": ""},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
@pytest.mark.parametrize("call", [("GET", ""), ("GET", "app.js"), ("POST", "answer"), ("DELETE", "scan/a")])
def test_requests_from_elsewhere_are_rejected(app: App, call: tuple[str, str], changed: dict[str, Any]) -> None:
    assert app.send(*call, **changed).status == 403


def test_only_reading_needs_no_origin(app: App) -> None:
    calls = [("GET", ""), ("POST", "answer"), ("POST", "scan?modality=T1"), ("DELETE", "scan/a")]
    assert [app.send(*call, Origin=None).status for call in calls] == [200, 403, 403, 403]
    local = f"localhost:{app.port}"
    assert app.send("DELETE", "scan/a", Host=local, Origin=f"http://{local}").status == 400


def test_too_large_files_are_rejected_before_they_are_sent(app: App) -> None:
    size = MAX_BYTES - 10
    with socket.create_connection((HOST, app.port), timeout=60) as connection:
        connection.sendall(app.start_of_upload(f"modality=T1&scan.nii.gz={size}&mask.nii.gz=11", size + 11))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("modality", "files"),
    [
        ("T1", {"../scan.nii.gz": b"1"}),
        ("T1", {"sub-01_T1w.nii.gz": b"1"}),
        ("T1", {"scan.bval": b"1", "scan.nii": b"1"}),
        ("T1", {"scan.nii": b"1", "scan.nii.gz": b"1"}),
        ("T1", {"mask.nii": b"1"}),
        ("T1", {}),
        ("X-ray", {"scan.nii": b"1"}),
    ],
)
def test_other_files_are_rejected(app: App, modality: str, files: dict[str, bytes]) -> None:
    assert app.give(modality, files).status == 400
    assert app.files() == []


@pytest.mark.parametrize("sizes", ["5", "-1", "x", "", "²", "1" * 5000, "0" * 5000 + "4"])
def test_sizes_that_are_not_those_of_the_body_are_rejected(app: App, sizes: str) -> None:
    rejected = app.send("POST", f"scan?modality=T1&scan.nii={quote(sizes)}", b"1234")
    assert rejected.status == 400
    assert "set_int_max_str_digits" not in rejected.json["message"]


def test_a_rejected_scan_has_its_reason_and_is_removed(app: App, t1: Any, scans: Any) -> None:
    key = app.give("T1", t1).json["key"]
    damaged = app.give("T1", {"scan.nii.gz": t1["scan.nii.gz"].read_bytes()[:3000]})
    assert damaged.status == 422
    assert damaged.json["reason"] == "gzip_truncated"
    assert damaged.json["meaning"] == ScanReason.GZIP_TRUNCATED.meaning
    assert damaged.json["file"] == "scan.nii.gz"
    assert str(app.uploads) not in damaged.body.decode()
    without_bval = {name: path for name, path in scans["dMRI"].items() if name != "scan.bval"}
    assert app.give("dMRI", without_bval).json["reason"] == "bval"
    assert app.give("rsfMRI", t1).json["reason"] == "rank"
    assert app.files() == []
    # No question is answered about the scan before.
    assert app.ask(key, QUESTIONS[0]).status == 400


def test_no_side_file_of_another_folder_is_used(app: App, scans: Any) -> None:
    more = {app.uploads / name: b"{}" for name in ("dataset_description.json", "scan.bval", "scan.bvec")}
    for path, content in more.items():
        path.write_bytes(content)
    given = app.give("dMRI", {"scan.nii.gz": scans["dMRI"]["scan.nii.gz"]})
    for path in more:
        path.unlink()
    assert (given.json["reason"], given.json["message"].startswith("there is no such file")) == ("bval", True)


def test_questions_are_about_the_newest_scan_only(app: App, t1: Any, scans: Any) -> None:
    first = app.give("T1", t1).json["key"]
    second = app.give("rsfMRI", scans["rsfMRI"]).json["key"]
    assert [app.ask(key, QUESTIONS[0]).status for key in (first, second)] == [400, 200]
    assert [app.send("GET", f"scan/{key}").status for key in (first, second)] == [400, 200]
    assert [app.send("DELETE", f"scan/{key}").status for key in (first, second)] == [400, 204]
    assert app.ask(second, QUESTIONS[0]).status == 400


@pytest.mark.parametrize("question", ["", "  ", "<image> what?", "x" * 70_000])
def test_questions_that_cannot_be_asked_are_rejected(app: App, t1: Any, question: str) -> None:
    key = app.give("T1", t1).json["key"]
    assert app.ask(key, question).status == 400
    assert app.ask(key, QUESTIONS[0]).status == 200


@pytest.mark.parametrize("token", ["<image>", "<|image|>", "<|im_end|>"])
def test_a_question_with_markup_is_rejected_by_its_name(app: App, random_run: Path, t1: Any, token: str) -> None:
    rejected = app.ask(app.give("T1", t1).json["key"], f"What is {token}?")
    assert rejected.status == 400
    assert rejected.json["message"].startswith(f"the question contains {token!r}")
    with pytest.raises(RunError, match="the question contains"):
        predict(random_run, question=f"What is {token}?")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b'{"key": "a"}', b'{"key": 1, "question": "?"}', b"\xff"),
        *(b"[" * 60_000, b"1" * 5000),
    ],
)
def test_other_bodies_are_rejected(app: App, body: bytes) -> None:
    assert app.send("POST", "answer", body).status == 400


def test_half_of_a_surrogate_pair_is_not_a_question() -> None:
    assert read_question(rb'{"key": "a", "question": "\ud83e\udde0?"}') == ("a", "🧠?")
    with pytest.raises(ValueError, match="surrogate"):
        read_question(rb'{"key": "a", "question": "\ud83e?"}')


def test_an_upload_is_in_a_private_folder_that_ends_with_the_connection(app: App, t1: Any) -> None:
    content = t1["scan.nii.gz"].read_bytes()
    with socket.create_connection((HOST, app.port), timeout=60) as connection:
        start = app.start_of_upload(f"modality=T1&scan.nii.gz={len(content)}", len(content))
        connection.sendall(start + content[:1000])
        wait_until(lambda: any(path.name == "scan.nii.gz" for path in app.files()))
        (folder,) = app.uploads.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in folder.glob("scan*")] == ["scan.nii.gz"]
    wait_until(lambda: app.files() == [])
    assert app.give("T1", t1).status == 200


def test_a_stalled_upload_ends(app: App, t1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbrella_train.app.server._CHUNK_SECONDS", 0.05)
    with socket.create_connection((HOST, app.port), timeout=60) as connection:
        connection.sendall(app.start_of_upload("modality=T1&scan.nii=100", 100) + b"1" * 50)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert app.files() == []
        monkeypatch.undo()
        assert app.give("T1", t1).status == 200


def test_a_page_that_is_closed_while_its_scan_is_read_leaves_no_scan(
    app: App, t1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, is_reading, is_closed = Session.prepare, threading.Event(), threading.Event()
    prepared: list[PreparedScan] = []

    def prepare_slowly(*args: Any, **options: Any) -> PreparedScan:
        is_reading.set()
        is_closed.wait(60)
        prepared.append(prepare(*args, **options))
        return prepared[0]

    monkeypatch.setattr(Session, "prepare", prepare_slowly)
    content = t1["scan.nii.gz"].read_bytes()
    with socket.create_connection((HOST, app.port), timeout=60) as connection:
        start = app.start_of_upload(f"modality=T1&scan.nii.gz={len(content)}", len(content))
        connection.sendall(start + content)
        assert is_reading.wait(60)
    assert app.send("GET", "").status == 200  # the server has seen the end of the connection
    is_closed.set()
    wait_until(lambda: bool(prepared) and app.files() == [])
    # Waits for the other request.
    assert app.send("DELETE", f"scan/{prepared[0].key}").status == 400


def test_an_unexpected_error_is_logged_without_files(
    app: App, t1: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("umbrella_train.app.session.answer_batch", fail)
    failed = app.ask(app.give("T1", t1).json["key"], "?")
    assert failed.status == 500
    assert "ZeroDivisionError" in failed.json["message"]
    assert "ZeroDivisionError" in caplog.text


def test_a_full_disk_is_named(app: App, t1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umbrella_train.app.server._receive", fill)
    full = app.give("T1", t1)
    assert (full.status, full.json["message"].startswith(str(app.uploads))) == (507, True)
    assert json.loads(full.body).keys() == {"message"}
