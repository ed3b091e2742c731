"""Checks a finished demo run against the figures of the README: `python tools/check_demo.py runs/demo`.

Each modality must have an accuracy of at least 95 % on its held-out questions; with another subject's scan, or without
one, the accuracy must be in the binomial interval of chance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MODALITIES = ("T1", "rsfMRI", "dMRI")
MIN_ACCURACY = 0.95
MIN_SUBJECTS = 64


def find_problems(metrics: dict[str, float]) -> list[str]:
    """Lists the expectations that an evaluation line of metrics.jsonl does not meet."""
    problems = []
    for modality in MODALITIES:
        subjects, accuracy = metrics[f"eval/subjects/{modality}"], metrics[f"eval/accuracy/{modality}"]
        if subjects < MIN_SUBJECTS:
            problems.append(f"{modality}: {subjects:.0f} held-out subjects, fewer than {MIN_SUBJECTS}")
        if accuracy < MIN_ACCURACY:
            problems.append(f"{modality}: accuracy {accuracy:.1%} is below {MIN_ACCURACY:.0%}")
        lower, upper = metrics[f"eval/chance_lower/{modality}"], metrics[f"eval/chance_upper/{modality}"]
        for control in ("shuffled", "no_scan"):
            value = metrics[f"eval/{control}/{modality}"]
            if not lower <= value <= upper:
                problems.append(f"{modality}: {control} {value:.1%} is not chance ({lower:.1%} to {upper:.1%})")
        if metrics[f"eval/swapped/{modality}"] > upper:
            problems.append(f"{modality}: swapped {metrics[f'eval/swapped/{modality}']:.1%} is above chance")
    return problems


def main() -> int:
    """Checks the run named on the command line; 0 if it meets all expectations."""
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "eval/accuracy/T1" in line]
    if not evaluations or not (run / "report.html").is_file():
        print(f"{run}: has no evaluation or no report")
        return 1
    problems = find_problems(evaluations[-1])
    print("\n".join(problems) if problems else f"{run}: the answers of every modality depend on its scans")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
