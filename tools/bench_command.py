"""Shared command line of benchmarks with several parts: which parts to run, sizes, and output."""

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


def run_parts(parts: Mapping[str, Part], *, description: str, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Run the parts selected on the command line, print their figures, and optionally write them as JSON.

    Args:
        parts: Functions from a temporary folder and the options to figures by name.
        description: The tool's docstring, for its help.
        sizes: Integer options by name: default and help text.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one or more of {', '.join(parts)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default:,})")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    figures: Result = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or parts:
            figures[name] = parts[name](Path(folder), options)
            print(f"\n{name}")
            for key, value in figures[name].items():
                print(f"  {key:72}{_format(value):>14}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def describe_machine() -> Result:
    """Versions of packages and number of cores."""
    packages = {name: version(name) for name in ("torch", "numpy", "monai", "nibabel", "transformers")}
    return {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), **packages}


def _format(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
