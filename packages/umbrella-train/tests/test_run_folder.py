"""The run folder: names, files, and lines that survive a crash."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from umbrella_train import run_folder
from umbrella_train.errors import RunError
from umbrella_train.run_folder import RunFolder, append_line, read_lines


def create(folder: Path) -> RunFolder:
    return RunFolder.create(folder / "runs", name="demo", config_text="name: demo\n")


def test_a_name_in_use_gets_a_number(tmp_path: Path) -> None:
    assert [create(tmp_path).path.name for _ in range(3)] == ["demo", "demo-2", "demo-3"]


def test_runs_that_start_together_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create(tmp_path).path, range(16)))
    assert len(set(folders)) == 16


def test_a_new_folder_has_config_salt_and_pictures(tmp_path: Path) -> None:
    folder = create(tmp_path)
    assert folder.config.read_text() == "name: demo\n"
    assert folder.salt.stat().st_mode & 0o777 == 0o600
    assert folder.pictures.is_dir()
    assert RunFolder.open(folder.path) == folder
    assert folder.subject_hash()("sub-01") == RunFolder.open(folder.path).subject_hash()("sub-01") != "sub-01"


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run's folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="missing: there is no such folder; give"):
        RunFolder.open(tmp_path / "missing")


def test_non_finite_metrics_are_valid_json(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.append_metrics({"step": 1, "loss": 0.5})
    folder.append_metrics({"step": 2, "loss": float("nan"), "grad/[T1]/x": float("inf")})
    lines = folder.metrics.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5}
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"step": 2, "loss": None, "grad/[T1]/x": None}


def test_an_incomplete_line_loses_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write('{"step": 2, "name": "Ä'.encode()[:-1])
    assert read_lines(path) == ([{"step": 1}], 1)
    append_line(path, {"step": 3})
    assert read_lines(path) == ([{"step": 1}, {"step": 3}], 1)


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl") == ([], 0)


def test_lines_after_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = create(tmp_path)
    assert folder.last_step() == 0
    for step in (1, 5, 9):
        folder.append_metrics({"step": step, "loss": float(step)})
    folder.cut_metrics(5)
    assert read_lines(folder.metrics)[0] == [{"step": 1, "loss": 1.0}, {"step": 5, "loss": 5.0}]
    assert folder.last_step() == 5


def rows_after_cut(folder: RunFolder, mark: dict[str, Any], *, step: int) -> list[int]:
    folder.cut_metrics(step, mark)
    rows, num_broken = read_lines(folder.metrics)
    assert num_broken == 0
    return [row["step"] for row in rows]


def test_metrics_are_cut_where_they_were_at_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = create(tmp_path)
    empty = folder.mark_metrics()
    for step in (1, 2):
        folder.append_metrics({"step": step})
    mark = folder.mark_metrics()
    folder.append_metrics({"step": 2, "eval_loss": 1.0})  # the evaluation after the checkpoint is done again
    folder.append_metrics({"step": 3})
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert rows_after_cut(folder, mark, step=2) == [1, 2]
    assert rows_after_cut(folder, empty, step=0) == []
    assert caplog.records == []


def test_damaged_metrics_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = create(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"step": step})
    mark = folder.mark_metrics()
    damaged = folder.metrics.read_bytes().replace(b'{"step": 2', b'{"st\xffp: 2')
    folder.metrics.write_bytes(damaged)
    assert rows_after_cut(folder, mark, step=3) == [1, 3]
    assert (folder.path / "metrics-damaged.jsonl").read_bytes() == damaged
    assert caplog.records[0].args == (folder.metrics, 3, 2, 1)
    # Two lines are there, but the third is lost.
    assert rows_after_cut(folder, mark, step=3) == [1, 3]
    assert (folder.path / "metrics-damaged-2.jsonl").exists()
    folder.metrics.unlink()
    assert rows_after_cut(folder, mark, step=3) == []
    assert caplog.records[2].args == (folder.metrics, 3, 0, 0)


def test_predictions_are_replaced(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.write_predictions([{"subject": "a"}, {"subject": "b"}])
    folder.write_predictions([{"subject": "c"}])
    assert read_lines(folder.predictions) == ([{"subject": "c"}], 0)
    assert [path.name for path in folder.path.glob("*.partial")] == []


def test_predictions_remain_if_writing_new_ones_fails(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.write_predictions([{"subject": "a"}])
    with pytest.raises(TypeError):
        folder.write_predictions([{"subject": object()}])
    assert read_lines(folder.predictions) == ([{"subject": "a"}], 0)


def test_resuming_with_other_settings_keeps_the_earlier_config(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, name="run", config_text="a: 1\n")
    folder.replace_config("a: 1\n", step=2)
    assert list(folder.path.glob("config*")) == [folder.config]
    folder.replace_config("a: 2\n", step=4)
    folder.replace_config("a: 3\n", step=4)
    assert {path.name: path.read_text() for path in folder.path.glob("config*")} == {
        "config.yaml": "a: 3\n",
        "config-until-checkpoint-4.yaml": "a: 1\n",
        "config-until-checkpoint-4-2.yaml": "a: 2\n",
    }


def test_rows_with_another_step_than_a_number_are_damaged(tmp_path: Path) -> None:
    folder = create(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": "x"}\n{"step": null}\n{"loss": 2.0}\n')
    assert read_lines(folder.metrics) == ([{"step": 1}, {"loss": 2.0}], 2)
    assert folder.last_step() == 1
    folder.cut_metrics(1, {"bytes": 5, "sha256": "of another file"})
    assert read_lines(folder.metrics) == ([{"step": 1}, {"loss": 2.0}], 0)


def test_a_folder_that_cannot_be_created_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "read_or_create_salt", full)
    with pytest.raises(OSError, match="No space"):
        create(tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []
