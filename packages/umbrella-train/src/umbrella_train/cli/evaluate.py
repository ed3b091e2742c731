"""The command umbrella-eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from umbrella_train.cli.options import DATA_ROOT_HELP, positive
from umbrella_train.command import errors_as_messages, make_parser, set_up_output
from umbrella_train.errors import RunError
from umbrella_train.evaluation.score_table import score_table
from umbrella_train.run_folder import RunFolder


@errors_as_messages()
def eval_command(arguments: Sequence[str] | None = None) -> None:
    """Score a trained model on its held-out subjects or on other manifests."""
    parser = make_parser(
        "umbrella-eval",
        "Score a trained model on its held-out subjects, or on other manifests. A complete evaluation is added to the "
        "run's files, which do not change with --manifest, --max-samples, or without the run's controls.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/demo")
    parser.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="FILE",
        help="a manifest to score on instead; can be repeated. Rows may end with the user's turn",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help=DATA_ROOT_HELP)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the answers to all rows to this file (JSON Lines), scored where the row has an 'answer'; ids and "
        "subjects are those of the manifest. An existing file is replaced",
    )
    parser.add_argument(
        "--no-controls",
        action="store_true",
        help="omit shuffled, swapped and absent scans; the run's files do not change",
    )
    parser.add_argument(
        "--max-samples",
        type=positive,
        metavar="N",
        help="questions per set of modalities, those with an 'answer' first; the run's files do not change",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN2",
        help="compare the answers of two evaluated runs, or folders of folds, on their common subjects; nothing is "
        "evaluated or written",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also train simple models on the run's training data, and score them on the same rows: constant answer, "
        "text without scan, linear models on a small volume and on an intensity histogram, a small CNN",
    )
    parser.add_argument(
        "--segmentations",
        type=Path,
        metavar="DIR",
        help="with --baselines: a folder of BIDS derivatives, for a linear model on region volumes of *_dseg.nii.gz",
    )
    parser.add_argument("--json", action="store_true", help="print all metrics as JSON instead of the table")
    options = parser.parse_args(arguments)

    if options.against is not None:
        rest = {name: value for name, value in vars(options).items() if name not in ("run", "against", "json", "quiet")}
        if given := [f"--{name.replace('_', '-')}" for name, value in rest.items() if value]:
            raise RunError(f"{', '.join(given)} cannot be combined with --against, which evaluates nothing")
        from umbrella_train.run.against import describe_differences  # late: imports numpy

        print(describe_differences(options.run, options.against, as_json=options.json))
        return
    if options.data_root and not options.manifest:
        raise RunError("--data-root needs --manifest")
    if options.segmentations and not options.baselines:
        raise RunError("--segmentations needs --baselines")
    RunFolder.open(options.run)
    from umbrella_train.run import evaluation  # late: imports torch

    set_up_output(is_quiet=options.quiet, has_messages=not options.quiet)
    metrics = evaluation.evaluate_run(
        options.run,
        manifests=options.manifest,
        data_root=options.data_root,
        controls=False if options.no_controls else None,
        max_samples=options.max_samples,
        out=options.out,
        baselines=options.baselines,
        segmentations=options.segmentations,
    )
    if options.json:
        print(json.dumps(metrics, indent=1))
        return
    if metrics:
        print(score_table(metrics))
