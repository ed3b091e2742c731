"""Checks a finished demo run against the figures of the README: `python tools/check_demo.py runs/demo`.

Each modality must have an accuracy of at least 95 % and an AUROC of at least 0.99 on its held-out questions. With
another subject's scan, or without one, the accuracy must be in the binomial interval of chance, and the AUROC be 0.5
within its interval.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MODALITIES = ("T1", "rsfMRI", "dMRI")
MIN_ACCURACY = 0.95
MIN_AUROC = 0.99
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
        if (auroc := metrics[f"eval/auroc/{modality}"]) < MIN_AUROC:
            problems.append(f"{modality}: AUROC {auroc:.3f} is below {MIN_AUROC}")
        lower, upper = metrics[f"eval/chance_lower/{modality}"], metrics[f"eval/chance_upper/{modality}"]
        for control in ("shuffled", "no_scan"):
            value = metrics[f"eval/{control}/{modality}"]
            if not lower <= value <= upper:
                problems.append(f"{modality}: {control} {value:.1%} is not chance ({lower:.1%} to {upper:.1%})")
            low, high = (metrics[f"eval/auroc_{control}_{side}/{modality}"] for side in ("lower", "upper"))
            if not low <= 0.5 <= high:
                problems.append(f"{modality}: AUROC of {control}, {low:.3f} to {high:.3f}, is not 0.5")
        if metrics[f"eval/swapped/{modality}"] > upper:
            problems.append(f"{modality}: swapped {metrics[f'eval/swapped/{modality}']:.1%} is above chance")
        if (swapped := metrics[f"eval/auroc_swapped/{modality}"]) > 0.5:
            problems.append(f"{modality}: AUROC of swapped, {swapped:.3f}, is above 0.5")
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
