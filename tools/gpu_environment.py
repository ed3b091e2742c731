"""Prints the card, driver, versions, date and commit, and writes them to a file: `gpu_environment.py FILE`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy", "monai", "nibabel", "peft", "pydantic")


def main() -> None:
    """Write the environment; what cannot be found is null."""
    environment = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # A copy of the working tree may come without its history.
        "commit": os.environ.get("COMMIT") or output_of("git", "rev-parse", "HEAD"),
        "card, driver, memory": output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }
    text = json.dumps(environment, indent=2)
    print(text)
    Path(sys.argv[1]).write_text(text + "\n")


def output_of(*command: str) -> str | None:
    """What a command prints; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() if ran.returncode == 0 else None


def version_of(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
