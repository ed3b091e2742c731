"""Which settings alter a run, and which changes a resumed run may make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from umbrella_train.checkpoint.changes import _HARMLESS, changed_settings, check_changes, influential, run_settings
from umbrella_train.config import DatasetConfig, RunConfig, load_config
from umbrella_train.config.schema import annotation_at, is_switch, section_of, without_none
from umbrella_train.errors import RunError


def write_manifest(folder: Path, *lines: str) -> DatasetConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return DatasetConfig(manifest=path)


def settings_of(config: RunConfig, *train: DatasetConfig, ranks: int = 1) -> dict[str, Any]:
    return run_settings(config, train=train, evaluation=(), num_ranks=ranks)


def keys_of(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key of the schema; keys of tables and lists are one key."""
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        dotted = f"{path}{name}"
        is_table = get_origin(without_none(field.annotation)) in (dict, list, tuple)
        if below is None or is_table:
            yield dotted
        else:
            yield from keys_of(below, f"{dotted}.")


def other_value(key: str, value: Any) -> Any:
    annotation = annotation_at(RunConfig, key.split("."))
    kind = without_none(annotation)
    if is_switch(annotation):
        return not value
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, "added"]
    if isinstance(value, dict):
        return {**value, "added": 1}
    assert value is None or isinstance(value, str), key
    return "added"


def test_every_key_of_the_schema_is_compared_unless_it_is_harmless() -> None:
    config = load_config(None)
    before = influential(config.model_dump(mode="json"))
    keys = list(keys_of(RunConfig))
    assert len(keys) > 60
    for key in keys:
        *sections, last = key.split(".")
        changed = config.model_dump(mode="json")
        section = changed
        for name in sections:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
        section[last] = other_value(key, section.get(last))
        is_harmless = any(key == name or key.startswith(f"{name}.") for name in _HARMLESS)
        assert bool(changed_settings(before, influential(changed))) is not is_harmless, key


def test_a_checkpoint_without_the_newest_keys_had_their_defaults() -> None:
    now = settings_of(load_config(None, ["--trainer.optim", "sgd"]))
    newest = ("trainer.on_non_finite", "trainer.optim", "trainer.early_stopping_patience", "dummy_loss.scale")
    before = {key: value for key, value in now.items() if key not in newest and not key.startswith("model.learn.")}
    before["trainer.max_skipped_steps"] = 3  # an earlier version recorded a harmless key
    assert changed_settings(before, now) == {"trainer.optim": ("adamw_torch_fused", "sgd")}


def test_a_section_that_was_not_set_is_not_one_of_an_earlier_version() -> None:
    now = settings_of(load_config(None))
    assert "data.synthetic.seed" in now
    before = {key: value for key, value in now.items() if not key.startswith("data.synthetic.")}
    assert "data.synthetic.seed" in changed_settings(before | {"data.synthetic": None}, now)


def test_harmless_keys_exist() -> None:
    for name in _HARMLESS:
        assert annotation_at(RunConfig, name.split(".")) is not None, name


def test_content_and_order_of_rows_count_and_the_place_does_not(tmp_path: Path) -> None:
    config = load_config(None)
    rows = write_manifest(tmp_path, "a", "b")
    before = settings_of(config, rows)
    (tmp_path / "moved").mkdir()
    assert settings_of(config, write_manifest(tmp_path / "moved", "a", "b")) == before
    assert set(changed_settings(before, settings_of(config, write_manifest(tmp_path, "b", "a")))) == {
        "data.train.0.content"
    }


def test_a_manifest_that_is_left_out_is_a_change(tmp_path: Path) -> None:
    config = load_config(None)
    rows = write_manifest(tmp_path, "a")
    changes = changed_settings(settings_of(config, rows, rows), settings_of(config, rows))
    assert set(changes) == {"data.train.1.content", "data.train.1.weight"}


def test_reordered_modalities_are_a_change_of_modalities() -> None:
    config = load_config(None)
    modalities = dict(reversed(config.model.modalities.items()))
    other = config.model_copy(update={"model": config.model.model_copy(update={"modalities": modalities})})
    changes = changed_settings(settings_of(config), settings_of(other))
    assert changes == {"model.modalities": (", ".join(config.model.modalities), ", ".join(modalities))}


CHANGES = {"data.train.0.content": ("a", "b"), "trainer.learning_rate": (1.0, 2.0), "ranks": (1, 2)}
KEYS = [*CHANGES, "trainer.max_steps"]


@pytest.mark.parametrize(
    ("allowed", "rejected"),
    [
        ([], {"data.train.0.content", "trainer.learning_rate", "ranks"}),
        (["data", "trainer.learning_rate"], {"ranks"}),
        (["data", "trainer", "ranks"], set()),
        (["trainer.max_steps"], {"data.train.0.content", "trainer.learning_rate", "ranks"}),
    ],
)
def test_changes_that_are_not_allowed_are_rejected_together(allowed: list[str], rejected: set[str]) -> None:
    if not rejected:
        check_changes(CHANGES, allowed=allowed, keys=KEYS, checkpoint=Path("checkpoint-3"))
        return
    with pytest.raises(RunError) as raised:
        check_changes(CHANGES, allowed=allowed, keys=KEYS, checkpoint=Path("checkpoint-3"))
    lines = str(raised.value).splitlines()
    assert {line.split(":")[0].strip() for line in lines if "(before:" in line} == rejected
    assert set(lines[-1].split()[-1].split(",")) == rejected


def test_a_misspelt_key_is_an_error() -> None:
    with pytest.raises(RunError, match=r"'trainer.learning_rate'"):
        check_changes({}, allowed=["trainer.learning_rat"], keys=KEYS, checkpoint=Path("checkpoint-3"))


def test_a_harmless_key_may_be_allowed() -> None:
    check_changes({}, allowed=["trainer.save_steps"], keys=KEYS, checkpoint=Path("checkpoint-3"))
