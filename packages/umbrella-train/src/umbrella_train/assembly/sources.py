"""Sources of samples: manifests, or the synthetic cohort, which is written first."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch.distributed as dist

from umbrella_data import ManifestError, read_manifest
from umbrella_data.modality import find_modality
from umbrella_data.progress import progress_bar
from umbrella_data.scan.diffusion import needs_fit
from umbrella_data.synthetic.cohort import DemoCohort, find_demo_cohort, make_demo_cohort
from umbrella_train.assembly.held_out import Overlap, check_held_out
from umbrella_train.config import DatasetConfig, RunConfig, SyntheticConfig
from umbrella_train.distributed.ranks import is_first_rank
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Manifests to train on and to evaluate on, and what is in both."""

    train: Sequence[DatasetConfig]
    evaluation: Sequence[DatasetConfig]
    overlap: Overlap = field(default_factory=Overlap)


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
            manifest = read_manifest(source.manifest, data_root=source.data_root, may_end_with_user=may_end_with_user)
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


def find_evaluation(config: RunConfig) -> Sequence[DatasetConfig]:
    """The held-out samples of an existing run; unlike `prepare_sources`, this writes no cohort.

    Raises:
        RunError: With all problems of all rows of the manifests, or if the synthetic cohort is missing.
    """
    if config.data.synthetic is None:
        check_manifests(config.data.evaluation, config=config)
        return config.data.evaluation
    return [DatasetConfig(manifest=_find_cohort(config, config.data.synthetic).test_manifest)]


def find_training(config: RunConfig) -> Sequence[DatasetConfig]:
    """The training samples of an existing run; raises as `find_evaluation`."""
    if config.data.synthetic is None:
        check_manifests(config.data.train, config=config)
        return config.data.train
    return [DatasetConfig(manifest=_find_cohort(config, config.data.synthetic).train_manifest)]


def _find_cohort(config: RunConfig, synthetic: SyntheticConfig) -> DemoCohort:
    directory = config.cohort_directory
    num_train, num_test, seed = synthetic.num_train, synthetic.num_test, synthetic.seed
    cohort = find_demo_cohort(directory, num_train=num_train, num_test=num_test, seed=seed)
    if cohort is None:
        raise RunError(
            f"{directory}: the synthetic cohort of this run is missing; write it again with: umbrella-data demo "
            f"--out {directory} --num-train {num_train} --num-test {num_test} --seed {seed}"
        )
    return cohort


def prepare_sources(config: RunConfig) -> Sources:
    """The config's manifests; a synthetic cohort is written by the first rank unless it exists.

    Raises:
        RunError: With all problems of all rows of all manifests, or what is in both training and evaluation data.
    """
    synthetic = config.data.synthetic
    if synthetic is None:
        train, evaluation = config.data.train, config.data.evaluation
        check_manifests([*train, *evaluation], config=config)
        overlap = check_held_out(train, evaluation, max_rows=MAX_ROWS_CHECKED, allow_overlap=config.data.allow_overlap)
        return Sources(train, evaluation, overlap)
    directory = config.cohort_directory
    is_first = is_first_rank()
    if not is_first:
        dist.barrier()
    total = synthetic.num_train + synthetic.num_test
    with progress_bar(total=total, words="writing the synthetic cohort", unit="subject", delay=1) as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        cohort = make_demo_cohort(
            directory,
            num_train=synthetic.num_train,
            num_test=synthetic.num_test,
            seed=synthetic.seed,
            progress=show,
        )
    if dist.is_initialized() and is_first:
        dist.barrier()
    return Sources([DatasetConfig(manifest=cohort.train_manifest)], [DatasetConfig(manifest=cohort.test_manifest)])


def warn_of_repeated_fits(sources: Sources, *, config: RunConfig) -> None:
    """Warns of each manifest to train on whose DWIs are fitted in every epoch, without a cache. No scan is opened."""
    for source in sources.train if config.data.cache_dir is None else ():
        manifest = read_manifest(source.manifest, data_root=source.data_root)
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
