"""`umbrella-data demo`: writes the demo cohort."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write the demo cohort: synthetic scans with known answers"
HELP = """\
Writes the demo cohort: synthetic T1, rsfMRI and dMRI scans, and manifests with questions about them."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument("--out", type=Path, required=True, help="folder for the cohort")
    command.add_argument("--num-train", type=int, default=300, help="training subjects (300)")
    command.add_argument("--num-test", type=int, default=64, help="held-out subjects (64)")
    command.add_argument("--seed", type=int, default=0, help="seed of the cohort (0)")


def run(options: argparse.Namespace) -> int:
    """Write the cohort."""
    from umbrella_data.progress import progress_bar
    from umbrella_data.synthetic.cohort import make_demo_cohort

    total = options.num_train + options.num_test
    with progress_bar(total=total, words="writing the demo cohort", unit="subject", delay=1) as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        cohort = make_demo_cohort(
            options.out,
            num_train=options.num_train,
            num_test=options.num_test,
            seed=options.seed,
            progress=show,
        )
    written = [str(path) for path in (cohort.train_manifest, cohort.test_manifest) if path.exists()]
    print(f"wrote {' and '.join(written)}")
    return 0
