"""Integrity manifest of checkpoints, and the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from umbrella_train.checkpoint.integrity import (
    INTEGRITY_NAME,
    checkpoint_problems,
    newest_valid_checkpoint,
    remove_old_checkpoints,
    set_newer_aside,
    write_integrity_manifest,
)
from umbrella_train.errors import RunError


def write_checkpoint(run: Path, step: int, *, seal: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "parts").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    (folder / "parts" / "state.json").write_text(f'{{"step": {step}}}')
    if seal:
        write_integrity_manifest(folder)
    return folder


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[100] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(150)))


def remove_a_file(folder: Path) -> None:
    (folder / "parts" / "state.json").unlink()


def remove_the_seal(folder: Path) -> None:
    (folder / INTEGRITY_NAME).unlink()


def cut_the_seal(folder: Path) -> None:
    seal = (folder / INTEGRITY_NAME).read_text()
    (folder / INTEGRITY_NAME).write_text(seal[: len(seal) // 2])


def blank_the_seal(folder: Path) -> None:
    (folder / INTEGRITY_NAME).write_bytes(bytes(100))


def put_another_thing_in_the_seal(folder: Path) -> None:
    (folder / INTEGRITY_NAME).write_text(json.dumps({"model.safetensors": "sha"}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_bit, "model.safetensors: its content changed after it was written"),
    (cut_short, "model.safetensors: has 150 bytes instead of 200"),
    (remove_a_file, "parts/state.json: is missing"),
    (remove_the_seal, "checkpoint-3: has no integrity.json"),
    (cut_the_seal, "integrity.json: cannot be read"),
    (blank_the_seal, "integrity.json: cannot be read"),
    (put_another_thing_in_the_seal, "integrity.json: cannot be read"),
]


def test_checkpoint_with_its_manifest_is_valid(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert checkpoint_problems(folder) == []
    assert set(json.loads((folder / INTEGRITY_NAME).read_text())) == {"model.safetensors", "parts/state.json"}


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_reported(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    damage(folder)
    (problem,) = checkpoint_problems(folder)
    assert says in problem
    assert problem.startswith(str(folder))


def test_added_file_is_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder / "note.txt").write_text("the good one")
    assert checkpoint_problems(folder) == []


@pytest.mark.parametrize("name", ["model-00001.safetensors", "optimizer.pt", "rng_state_1.pth", "pytorch_model.bin"])
def test_added_weights_and_pickles_are_reported(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder / name).write_bytes(b"others")
    (problem,) = checkpoint_problems(folder)
    assert f"{name}: was not written with this checkpoint" in problem


def test_manifest_can_be_written_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    flip_a_bit(folder)
    write_integrity_manifest(folder)
    assert checkpoint_problems(folder) == []


def test_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_valid_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
def test_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 10)
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert newest_valid_checkpoint(tmp_path) == good
    assert "a damaged checkpoint" in caplog.text
    assert str(bad) in caplog.text


def test_run_without_a_valid_checkpoint_is_rejected_with_all_problems(tmp_path: Path) -> None:
    flip_a_bit(write_checkpoint(tmp_path, 3))
    write_checkpoint(tmp_path, 6, seal=False)
    with pytest.raises(RunError, match="has no checkpoint to resume from") as caught:
        newest_valid_checkpoint(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "checkpoint-6: has no integrity.json" in lines[1]
    assert "its content changed" in lines[2]


def test_run_without_any_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no checkpoint to resume from$"):
        newest_valid_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keep", "best", "remaining"),
    [
        (None, None, {2, 4, 6, 9}),
        (2, None, {6, 9}),
        (1, None, {9}),
        (1, 4, {4, 9}),
        (2, 4, {4, 9}),
        (3, 2, {2, 6, 9}),
    ],
)
def test_only_finished_checkpoints_count_toward_the_limit(
    tmp_path: Path, keep: int | None, best: int | None, remaining: set[int]
) -> None:
    for step in (2, 4, 6, 9, 12):
        write_checkpoint(tmp_path, step, seal=step != 12)
    remove_old_checkpoints(tmp_path, keep=keep, best=None if best is None else tmp_path / f"checkpoint-{best}")
    assert {int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir()} == remaining


def test_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step)
    assert set_newer_aside(tmp_path, 10) == []
    assert {path.name for path in set_newer_aside(tmp_path, 2)} == {"checkpoint-9", "checkpoint-10"}
    write_checkpoint(tmp_path, 10)
    assert set_newer_aside(tmp_path, 2) == [tmp_path / "set-aside-2" / "checkpoint-10"]
    assert newest_valid_checkpoint(tmp_path).name == "checkpoint-2"
    assert checkpoint_problems(tmp_path / "set-aside-1" / "checkpoint-9") == []


def test_a_state_of_another_step_than_the_name_is_a_problem(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3, seal=False)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    write_integrity_manifest(folder)
    assert checkpoint_problems(folder) == []
    renamed = folder.rename(tmp_path / "checkpoint-4")
    assert [problem.split(":")[0] for problem in checkpoint_problems(renamed)] == [str(renamed / "trainer_state.json")]
    assert checkpoint_problems(renamed.rename(tmp_path / "mine")) == []
