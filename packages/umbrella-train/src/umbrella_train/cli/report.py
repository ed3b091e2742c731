"""The command umbrella-report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from umbrella_train.command import errors_as_messages, make_parser


@errors_as_messages()
def report_command(arguments: Sequence[str] | None = None) -> None:
    """Write the report of one run, or of several to compare."""
    parser = make_parser("umbrella-report", "Write report.html from the files of one run, or of several to compare.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; also of a crashed run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (default: in RUN, or next to the first RUN)"
    )
    options = parser.parse_args(arguments)

    from umbrella_train.report import build_report  # late: imports matplotlib

    print(build_report(options.runs, output=options.output))
