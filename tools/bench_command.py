"""The command line that benchmarks of several parts share: which parts to run, how large, and where the figures go."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]
Part = Callable[[Path, argparse.Namespace], Result]


def run_parts(parts: Mapping[str, Part], *, words: str, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Run the parts that the command line names, print their figures, and write them where it asks.

    Args:
        parts: Each takes a folder to work in and the options, and gives figures by their names.
        words: The tool's docstring, for its help.
        sizes: Whole numbers that may be set: the default and what it means, by the name of the option.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures")
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default:,})")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: Result = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or parts:
            found[name] = parts[name](Path(folder), options)
            print(f"\n{name}")
            for key, value in found[name].items():
                print(f"  {key:72}{_shown(value):>14}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def describe_machine() -> Result:
    """Versions and cores."""
    packages = {name: version(name) for name in ("torch", "numpy", "monai", "nibabel", "transformers")}
    return {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), **packages}


def _shown(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
