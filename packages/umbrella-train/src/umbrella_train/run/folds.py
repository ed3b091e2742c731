"""Cross-validation: one ordinary run for each fold, in one command or as a job array, and their pooled report."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from umbrella_train.assembly.sources import name_cohort_directory
from umbrella_train.checkpoint.resume import AUTO
from umbrella_train.config import RunConfig
from umbrella_train.config.strict_yaml import read_yaml
from umbrella_train.distributed.ranks import on_first_rank
from umbrella_train.errors import RunError
from umbrella_train.evaluation.score_table import score_table
from umbrella_train.run.in_turn import train_in_turn
from umbrella_train.run.training import train
from umbrella_train.run_folder import RunFolder, fold_folders, read_lines, runs_hint
from umbrella_train.stop_signals import ended_by_signals

logger = logging.getLogger(__name__)


def train_folds(
    config: RunConfig,
    *,
    num_folds: int,
    fold: int | None = None,
    dry_run: bool = False,
    resume: str | None = None,
    allow_changed: Collection[str] = (),
    max_time: float | None = None,
) -> Path | None:
    """Trains folds as the runs `OUTPUT_DIR/NAME/fold-1` and so on; once all are finished, pools their answers.

    Args:
        config: The run, without folds.
        num_folds: Number of folds, from 2.
        fold: The only fold to train, from 1; None: all, one after the other.
        dry_run: As of `train`, for one fold.
        resume: None, or `auto`: finished folds are skipped, others resume.
        allow_changed: As of `train`.
        max_time: As of `train`, for all folds of this call together.

    Returns:
        `OUTPUT_DIR/NAME` if all folds are finished, otherwise the folder of the last one that was trained; None for a
        dry run.

    Raises:
        RunError: As from `train`, or the arguments do not fit together or to the folders.
        RunStoppedError: As from `train`, also if there is no time for another fold.
    """
    top = config.output_dir / config.name
    _check(config, num_folds=num_folds, fold=fold, resume=resume, is_new=resume is None and not dry_run)
    numbers = [fold] if fold is not None else range(1, num_folds + 1)
    configs = {number: _config_of(config, number, num_folds=num_folds) for number in numbers}
    if dry_run:
        return train(configs[numbers[0]], dry_run=True)
    last = train_in_turn(
        list(configs.values()),
        top=top,
        marks_top=fold is None,
        resume=resume,
        allow_changed=allow_changed,
        max_time=max_time,
    )
    with ended_by_signals():
        return on_first_rank(lambda: _pool(config, num_folds)) or last


def _check(config: RunConfig, *, num_folds: int, fold: int | None, resume: str | None, is_new: bool) -> None:
    """Rejects arguments that do not fit together, and folders that are in use."""
    top = config.output_dir / config.name
    if config.stages:
        raise RunError(
            "--folds: cannot be combined with stages; remove them (--stages []), or take the config.yaml of a trained "
            "stage, which starts from the model of the stage before, with another --name"
        )
    if num_folds < 2 or (fold is not None and not 1 <= fold <= num_folds):
        given = f"--folds {num_folds}" + ("" if fold is None else f" --fold {fold}")
        raise RunError(f"{given}: there are at least 2 folds, numbered from 1")
    if config.data.num_folds is not None:
        raise RunError("data.num_folds, data.fold: are set by --folds and --fold; remove them from the configuration")
    if resume not in (None, AUTO):
        raise RunError(f"--resume {resume}: with --folds it is {AUTO}, which resumes each fold")
    if RunFolder(top).config.exists() and not fold_folders(top):
        raise RunError(f"{top}: is the folder of a run without folds; choose another --name")
    if not fold_folders(top) and runs_hint(top):
        raise RunError(f"{top}: is the folder of a run in stages, or of other runs; choose another --name")
    found = [read_yaml(RunFolder(path).config)[0].get("data") or {} for path in fold_folders(top)]
    others = {data.get("num_folds") for data in found} - {num_folds, None}
    if others and (is_new or resume is not None):
        numbers = ", ".join(map(str, others))
        raise RunError(f"{top}: has folds of --folds {numbers}, not {num_folds}; choose another --name")
    existing = [path.name for path in fold_folders(top) if fold is None or path.name == f"fold-{fold}"]
    if is_new and existing:
        raise RunError(f"{top}: has {', '.join(existing)}; resume with --resume {AUTO}, or choose another --name")


def _config_of(config: RunConfig, number: int, *, num_folds: int) -> RunConfig:
    config = name_cohort_directory(config)  # one cohort for all folds
    data = config.data.model_copy(update={"num_folds": num_folds, "fold": number})
    top = config.output_dir / config.name
    return config.model_copy(update={"name": f"fold-{number}", "output_dir": top, "data": data})


def _pool(config: RunConfig, num_folds: int) -> Path | None:
    """Pools the folds if all are finished; their folder, or None."""
    from umbrella_train.report import build_report  # late: imports matplotlib
    from umbrella_train.report.folds import pool_folds

    top = config.output_dir / config.name
    folds = fold_folders(top)
    if [path.name for path in folds] != [f"fold-{number}" for number in range(1, num_folds + 1)] or not all(
        RunFolder(path).finished.exists() for path in folds
    ):
        logger.info("%s: the figures of all folds are pooled when each one is finished", top)
        return None
    folder = pool_folds(top)
    if config.report.enabled:
        build_report([top])
    logger.info("\n%s\n", score_table(read_lines(folder.metrics)[0][-1]))
    return top
