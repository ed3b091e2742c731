"""Where the samples come from: manifests, or the synthetic cohort, which is written first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from tqdm import tqdm

from umbrella_data.synthetic import make_demo_cohort
from umbrella_train.config import DatasetConfig, RunConfig


@dataclass(frozen=True)
class Sources:
    """Manifests to train on and to evaluate on."""

    train: Sequence[DatasetConfig]
    evaluation: Sequence[DatasetConfig]


def prepare_sources(config: RunConfig) -> Sources:
    """The config's manifests; a synthetic cohort is written by the first rank, or used again if it is there."""
    synthetic = config.data.synthetic
    if synthetic is None:
        return Sources(config.data.train, config.data.evaluation)
    directory = synthetic.directory or config.output_dir / "synthetic-cohort"
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first:
        dist.barrier()
    with tqdm(desc="writing the synthetic cohort", file=sys.stderr, disable=not is_first) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
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
