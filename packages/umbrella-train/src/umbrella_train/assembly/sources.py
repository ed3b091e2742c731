"""Sources of samples: manifests, or the synthetic cohort, which is written first."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from umbrella_data import ManifestError
from umbrella_data.errors import did_you_mean
from umbrella_data.manifest.sample import Sample
from umbrella_data.modality import find_modality
from umbrella_data.progress import progress_bar
from umbrella_data.scan.diffusion import needs_fit
from umbrella_data.synthetic.cohort import DemoCohort, find_demo_cohort, make_demo_cohort
from umbrella_train.assembly.held_out import Overlap, check_held_out
from umbrella_train.assembly.subject_parts import Parts, open_source, split_train
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.config.data import SyntheticConfig
from umbrella_train.distributed.ranks import is_first_rank
from umbrella_train.errors import RunError
from umbrella_train.evaluation.answer_space import AnswerSpace, collect_answer_spaces, write_answer_spaces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Manifests, or parts of them, to train on and to evaluate on.

    Attributes:
        train: To train on.
        evaluation: To evaluate on.
        overlap: What is in the evaluation data and in the other two.
        calibration: Subjects of the training data that are not trained on, to fit the temperature of probabilities.
    """

    train: Sequence[DatasetConfig]
    evaluation: Sequence[DatasetConfig]
    overlap: Overlap = field(default_factory=Overlap)
    calibration: Sequence[DatasetConfig] = ()


# Checking takes 50 to 100 us per row: seconds for a cohort, minutes for a population.
MAX_ROWS_CHECKED = 50_000
# Rows with diffusion scans that are looked at: nearly always, all of a manifest are DWIs, or all are maps.
_MAX_ROWS_OF_DWIS = 100


def check_manifests(sources: Sequence[DatasetConfig], *, config: RunConfig, may_end_with_user: bool = False) -> None:
    """Validates every row before anything is built; no scan is opened.

    If the config skips bad scans, a missing file is one of them. Of a manifest with more than `MAX_ROWS_CHECKED` rows,
    only modalities are checked, with a warning: its rows are checked when they are read. With `may_end_with_user`, rows
    may end with the user's turn, to generate answers for them.

    Raises:
        RunError: With all problems of all rows of all manifests, and modalities that the config does not have.
    """
    problems = []
    for source in sources:
        try:
            manifest = open_source(source, may_end_with_user=may_end_with_user)
            if len(manifest) <= MAX_ROWS_CHECKED:
                manifest.validate(check_files=config.data.on_bad_scan == "raise")
            elif is_first_rank():
                logger.warning(
                    "%s: has %d rows, more than the %d that are checked before a run; an invalid row stops the run "
                    "when it is read. umbrella-data check %s checks all of them",
                    source.manifest,
                    len(manifest),
                    MAX_ROWS_CHECKED,
                    source.manifest,
                )
            held = frozenset[str]().union(*manifest.facts.modality_sets())
            problems += [
                f"{source.manifest}: has {name} scans, and the config has no model.modalities.{name}: add their "
                "image_size and patch_size, or remove these rows"
                for name in sorted(held - set(config.model.modalities))
            ]
        except (ManifestError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))


def name_cohort_directory(config: RunConfig) -> RunConfig:
    """The configuration with an explicit folder of its synthetic cohort, so that a run's copy names its data."""
    synthetic = config.data.synthetic
    if synthetic is None or synthetic.directory is not None:
        return config
    named = synthetic.model_copy(update={"directory": config.cohort_directory})
    return config.model_copy(update={"data": config.data.model_copy(update={"synthetic": named})})


def find_sources(config: RunConfig, evaluation: Sequence[DatasetConfig] | None = None) -> Sources:
    """The samples of an existing run; unlike `prepare_sources`, this writes no cohort and compares nothing.

    Args:
        config: The run's.
        evaluation: Manifests to evaluate on instead of the run's own.

    Returns:
        Without training data and without samples to calibrate with, if manifests of the training data are missing here
        and are not evaluated on.

    Raises:
        RunError: With all problems of all rows of the manifests, or if the synthetic cohort is missing.
    """
    synthetic, has_folds = config.data.synthetic, config.data.fold is not None
    if synthetic is None:
        train = config.data.train if all(source.manifest.is_file() for source in config.data.train) else ()
        own = config.data.train if has_folds else config.data.evaluation
        if evaluation is None:
            check_manifests(own, config=config)
    else:
        directory = config.cohort_directory
        num_train, num_test, seed = synthetic.num_train, synthetic.num_test, synthetic.seed
        cohort = find_demo_cohort(directory, num_train=num_train, num_test=num_test, seed=seed)
        if cohort is None and evaluation is None:
            raise RunError(
                f"{directory}: the synthetic cohort of this run is missing; write it again with: umbrella-data demo "
                f"--out {directory} --num-train {num_train} --num-test {num_test} --seed {seed}"
            )
        train = [] if cohort is None else [DatasetConfig(manifest=cohort.train_manifest)]
        own = [] if cohort is None else [DatasetConfig(manifest=cohort.test_manifest)]
    if not train and config.data.calibration_fraction:
        logger.warning("the training manifests of this run are not here: nothing to calibrate probabilities with")
    parts = split_train(train, config=config) if train else Parts(())
    if evaluation is None:
        evaluation = parts.evaluation if has_folds else own
    return Sources(parts.train, evaluation, calibration=parts.calibration)


def prepare_sources(config: RunConfig) -> Sources:
    """The config's manifests, or parts of them; a synthetic cohort is written by the first rank unless it exists.

    Raises:
        RunError: With all problems of all rows of all manifests, what is in both training and evaluation data, or too
            few subjects for the folds.
    """
    if config.data.synthetic is None:
        train, evaluation = config.data.train, config.data.evaluation
        check_manifests(train if config.data.fold else [*train, *evaluation], config=config)
    else:
        cohort = _write_cohort(config, config.data.synthetic)
        train = [DatasetConfig(manifest=cohort.train_manifest)]
        evaluation = [DatasetConfig(manifest=cohort.test_manifest)]
    parts = split_train(train, config=config)
    num_train, num_held_out, num_calibration = parts.num_subjects
    if parts.evaluation:
        if is_first_rank():
            logger.info(
                "fold %d of %d of the training data: %d subjects to evaluate on, %d to train on%s",
                config.data.fold,
                config.data.num_folds,
                num_held_out,
                num_train,
                "; the evaluation data are not used" if evaluation else "",
            )
        evaluation = list(parts.evaluation)
    if parts.calibration and is_first_rank():
        logger.info("%d subjects are left out of training, to calibrate probabilities", num_calibration)
    overlap = Overlap()
    if config.data.synthetic is None:
        overlap = check_held_out(
            [*parts.train, *parts.calibration],
            evaluation,
            max_rows=MAX_ROWS_CHECKED,
            allow_overlap=config.data.allow_overlap,
        )
    return Sources(parts.train, evaluation, overlap, parts.calibration)


def _write_cohort(config: RunConfig, synthetic: SyntheticConfig) -> DemoCohort:
    is_first = is_first_rank()
    if not is_first:
        dist.barrier()
    total = synthetic.num_train + synthetic.num_test
    with progress_bar(total=total, words="writing the synthetic cohort", unit="subject", delay=1) as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        cohort = make_demo_cohort(
            config.cohort_directory,
            num_train=synthetic.num_train,
            num_test=synthetic.num_test,
            seed=synthetic.seed,
            progress=show,
        )
    if dist.is_initialized() and is_first:
        dist.barrier()
    return cohort


def find_answer_spaces(sources: Sequence[DatasetConfig], *, config: RunConfig) -> dict[str, AnswerSpace]:
    """The possible answers of each task in training manifests, of at most `MAX_ROWS_CHECKED` rows of each.

    Raises:
        RunError: A grid of candidate numbers is for a task without such numbers in training.
    """

    def samples() -> Iterator[Sample]:
        for source in sources:
            manifest = open_source(source)
            yield from (manifest[row] for row in range(0, len(manifest), -(-len(manifest) // MAX_ROWS_CHECKED)))

    spaces = collect_answer_spaces(samples(), decimals=config.data.number_decimals)
    tasks = {name.partition("/")[2] for name, space in spaces.items() if space.minimum is not None}
    if unknown := [f"{task}{did_you_mean(task, tasks)}" for task in config.report.number_grids if task not in tasks]:
        raise RunError(
            f"report.number_grids: the training data have no numbers in plain digits for the task "
            f"{', '.join(unknown)}; remove it"
        )
    return spaces


def save_answer_spaces(path: Path, sources: Sequence[DatasetConfig], *, config: RunConfig) -> None:
    """Write `find_answer_spaces` of the training manifests as JSON."""
    write_answer_spaces(path, find_answer_spaces(sources, config=config))


def warn_of_repeated_fits(sources: Sources, *, config: RunConfig) -> None:
    """Warns of each manifest to train on whose DWIs are fitted in every epoch, without a cache. No scan is opened."""
    for source in sources.train if config.data.cache_dir is None else ():
        manifest = open_source(source)
        if not any(map(_has_maps, manifest.facts.modality_sets())):
            continue
        rows = (row for row in range(len(manifest)) if _has_maps(manifest.modalities(row)))
        scans = (scan for row in islice(rows, _MAX_ROWS_OF_DWIS) for scan in manifest[row].scans)
        if any(needs_fit(scan.paths, scan.modality) for scan in scans):
            logger.warning(
                "%s: has DWIs, and without data.cache_dir their tensors are fitted again in every epoch: set "
                "data.cache_dir to a folder for preprocessed volumes",
                source.manifest,
            )


def _has_maps(modalities: Collection[str]) -> bool:
    return any(find_modality(name).num_channels > 1 for name in modalities)
