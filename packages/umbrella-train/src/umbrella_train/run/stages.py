"""A run in stages: one ordinary run for each, in one command or as a chain of jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from umbrella_data.errors import did_you_mean
from umbrella_train.checkpoint.changes import changed_settings, check_changes, describe_changes, influential
from umbrella_train.checkpoint.resume import AUTO
from umbrella_train.config import RunConfig, load_config, stage_configs
from umbrella_train.errors import RunError
from umbrella_train.run.in_turn import free_memory, train_in_turn
from umbrella_train.run.training import train
from umbrella_train.run_folder import RunFolder, fold_folders

logger = logging.getLogger(__name__)


def train_stages(
    config: RunConfig,
    *,
    stage: str | None = None,
    dry_run: bool = False,
    resume: str | None = None,
    allow_changed: Collection[str] = (),
    max_time: float | None = None,
) -> Path | None:
    """Trains the stages of a configuration as the runs `OUTPUT_DIR/NAME/STAGE`, each from the model of the one before.

    Args:
        config: The run, with stages.
        stage: The name of the only stage to train; None: all, one after the other.
        dry_run: As of `train`, for each stage; all start from the weights of the first one.
        resume: None, or `auto`: finished stages are skipped, others resume.
        allow_changed: As of `train`.
        max_time: As of `train`, for all stages of this call together.

    Returns:
        The folder of the last stage that was trained; None for a dry run.

    Raises:
        RunError: As from `train`, or the arguments do not fit together or to the folders, or the stage before `stage`
            is not finished.
        RunStoppedError: As from `train`, also if there is no time for another stage.
    """
    names = [each.name for each in config.stages]
    if not names:
        raise RunError("--stage: the configuration has no stages")
    if stage is not None and stage not in names:
        meant = did_you_mean(stage, names)
        raise RunError(f"--stage {stage}: there is no such stage{meant} (there are {', '.join(names)})")
    numbers = range(len(names)) if stage is None else [names.index(stage)]
    if dry_run:
        _dry_run([stage_configs(config, from_base=True)[number] for number in numbers])
        return None
    configs = stage_configs(config)
    top = config.output_dir / config.name
    _check(configs, numbers, top=top, resume=resume)
    if stage is not None:
        _check_previous(configs, numbers[0])
    left = [configs[number] for number in numbers if not _is_done(configs, number, allow_changed)]
    if not left:
        return _folder(configs[numbers[-1]]).path
    # What exists was checked: each stage must get the folder that the next one starts from, never NAME-2.
    return train_in_turn(left, top=top, marks_top=True, resume=AUTO, allow_changed=allow_changed, max_time=max_time)


def _is_launched_first() -> bool:
    """Whether this is the first of the launched processes, also before they know each other."""
    return os.environ.get("RANK", "0") == "0"


def _dry_run(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        if _is_launched_first():
            logger.info("\nstage %s", config.name)
        train(config, dry_run=True)
        free_memory()


def _check(configs: Sequence[RunConfig], numbers: Sequence[int], *, top: Path, resume: str | None) -> None:
    """Rejects arguments that do not fit together, and folders that are in use."""
    if resume not in (None, AUTO):
        raise RunError(
            f"--resume {resume}: with stages it is {AUTO}, which resumes each stage; a single stage is resumed with "
            "--config STAGE/config.yaml"
        )
    if RunFolder(top).config.exists():
        raise RunError(f"{top}: is the folder of a run without stages; choose another --name")
    if fold_folders(top):
        raise RunError(f"{top}: is the folder of a cross-validation; choose another --name")
    existing = [configs[number].name for number in numbers if _folder(configs[number]).config.exists()]
    if resume is None and existing:
        raise RunError(f"{top}: has {', '.join(existing)}; resume with --resume {AUTO}, or choose another --name")
    for number in numbers:
        start = f"{configs[number].name}-"
        paths = [path.parent for path in top.glob(f"{start}*/config.yaml")]
        if other := next((path for path in paths if path.name.removeprefix(start).isdecimal()), None):
            raise RunError(f"{other}: is another run of the stage {configs[number].name}; move it out of {top}")


def _check_previous(configs: Sequence[RunConfig], number: int) -> None:
    """Rejects a stage whose model is not there yet."""
    if number == 0 or not _follows(configs, number):
        return
    previous = _folder(configs[number - 1])
    if not previous.finished.exists():
        name = configs[number - 1].name
        raise RunError(
            f"--stage {configs[number].name}: {previous.path} is not finished; train it first: --stage {name}"
        )


def _is_done(configs: Sequence[RunConfig], number: int, allow_changed: Collection[str]) -> bool:
    """Whether a stage is left as it is, because the next one has started from its model.

    Raises:
        RunError: It is not finished any more, or its settings have changed: the next one would no longer follow it.
    """
    if number + 1 == len(configs) or not _follows(configs, number + 1):
        return False
    folder, following = _folder(configs[number]), _folder(configs[number + 1])
    if not following.config.exists():
        return False
    if not folder.finished.exists():
        raise RunError(
            f"{folder.path}: is not finished, but {following.path} has started from its model; move that folder away, "
            "to train both"
        )
    before, now = (influential(each.model_dump(mode="json")) for each in (load_config(folder.config), configs[number]))
    changes = changed_settings(before, now)
    check_changes(changes, allowed=allow_changed, keys=allow_changed, checkpoint=folder.path)
    if _is_launched_first():
        logger.info("%s: is finished", folder.path)
        for line in describe_changes(changes):
            logger.warning("%s: is finished, with another setting: %s", folder.path, line)
    return True


def _follows(configs: Sequence[RunConfig], number: int) -> bool:
    """Whether a stage starts from the model of the one before."""
    return configs[number].model.pretrained == str(_folder(configs[number - 1]).model)


def _folder(config: RunConfig) -> RunFolder:
    return RunFolder(config.output_dir / config.name)
