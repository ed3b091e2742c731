"""What a resumed run would do differently than the run that wrote the checkpoint."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from umbrella_data.errors import did_you_mean
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.config.manifest_part import ManifestPart
from umbrella_train.config.schema import annotation_at, section_of
from umbrella_train.errors import RunError

Changes = Mapping[str, tuple[Any, Any]]
"""Values before and now, by dotted key."""

RECORD_NAME = "run_record.json"

# Keys that do not alter the trained weights: names, folders, logging, saving, loading, evaluation and the report. A new
# key counts as one that does.
_HARMLESS = frozenset(
    {
        "data.allow_overlap",
        "data.cache_dir",
        "data.evaluation",  # compared by content
        "data.index_dir",
        "data.synthetic.directory",
        "data.train",  # compared by content
        "name",
        "output_dir",
        "report",
        "stages",  # are runs of their own
        "trainer.dataloader_num_workers",
        "trainer.ddp_timeout",
        "trainer.eval_steps",
        "trainer.logging_steps",
        "trainer.max_skipped_steps",
        "trainer.parity_every",
        "trainer.per_device_eval_batch_size",
        "trainer.report_to",
        "trainer.save_before_seconds",
        "trainer.save_steps",
        "trainer.save_total_limit",
        "trainer.world_size",  # only expected; the number of ranks is compared
    }
)


def run_settings(
    config: RunConfig, *, train: Sequence[DatasetConfig], evaluation: Sequence[DatasetConfig], num_ranks: int
) -> dict[str, Any]:
    """Every setting that alters a run, by its dotted key, for a checkpoint.

    Manifests are read whole, for a hash of content and order of their rows; a part also has a hash of its rows.
    """
    settings: dict[str, Any] = {"ranks": num_ranks}
    for name, sources in (("train", train), ("evaluation", evaluation)):
        for number, source in enumerate(sources):
            content = _hash(source.manifest)
            if isinstance(source, ManifestPart):
                content += f", rows {source.rows.fingerprint}"
            settings[f"data.{name}.{number}.content"] = content
            settings[f"data.{name}.{number}.weight"] = source.weight
    # The order of the modalities is that of their tags.
    settings["model.modalities"] = ", ".join(config.model.modalities)
    return settings | influential(config.model_dump(mode="json"))


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values; None where there is no such setting.

    A checkpoint of an earlier version lacks keys that were added since: it was trained with their defaults. It may have
    keys that count as harmless by now.
    """
    before = {key: value for key, value in before.items() if key not in _HARMLESS}
    before = {key: _default_of(key) for key in now.keys() - before.keys() if _is_added(key, before)} | before
    keys = list(dict.fromkeys([*now, *before]))
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _is_added(key: str, before: Mapping[str, Any]) -> bool:
    """Whether a key was not left out with a section that was not set."""
    parts = key.split(".")
    return not any(".".join(parts[:depth]) in before for depth in range(1, len(parts)))


def _default_of(key: str) -> Any:
    """The default of a key, as in a dumped configuration; None if it has none."""
    *path, name = key.split(".")
    section = section_of(annotation_at(RunConfig, path))
    field = None if section is None else section.model_fields.get(name)
    if field is None or field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def check_changes(changes: Changes, *, allowed: Collection[str], keys: Collection[str], checkpoint: Path) -> None:
    """Rejects changes, of the settings named by `keys`, that are in no key or section of `allowed`.

    Raises:
        RunError: With every such change, or with a name in `allowed` that is no key or section.
    """
    sections = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 2)} | _HARMLESS
    unknown = [f"{name}{did_you_mean(name, sorted(sections))}" for name in allowed if name not in sections]
    if unknown:
        raise RunError(f"--allow-changed: there is no key or section {', '.join(unknown)}")
    rejected = {
        key: values
        for key, values in changes.items()
        if not any(key == name or key.startswith(f"{name}.") for name in allowed)
    }
    if rejected:
        lines = [
            f"{checkpoint}: the run would resume with other settings than those it was trained with",
            *describe_changes(rejected),
        ]
        raise RunError(
            "\n  ".join(lines) + "\nResume with the earlier settings, or allow the change; it is then listed in "
            f"config.yaml and in the report: --allow-changed {','.join(rejected)}"
        )


def describe_changes(changes: Changes) -> list[str]:
    """One line per setting."""
    return [f"{key}: {_shown(now)} (before: {_shown(before)})" for key, (before, now) in changes.items()]


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint recorded of its run: `settings`, `metrics`; empty for one of an earlier version."""
    path = checkpoint / RECORD_NAME
    return json.loads(path.read_bytes()) if path.is_file() else {}


def write_record(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Adds the record to a checkpoint, before its integrity manifest is written."""
    (checkpoint / RECORD_NAME).write_text(json.dumps(record, indent=1), encoding="utf-8")


def influential(section: Mapping[str, Any], *, path: str = "") -> dict[str, Any]:
    """The values of a dumped configuration that alter the trained weights, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{path}{name}"
        if key not in _HARMLESS:
            flat |= influential(value, path=f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is None else reprlib.repr(value) if isinstance(value, str) else str(value)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
