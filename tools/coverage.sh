#!/usr/bin/env bash
# Measures how much of the packages the tests run, and fails below the floor in pyproject.toml. Takes longer than the
# tests alone, and is therefore not part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
uv run coverage erase
uv run coverage run -m pytest -p no:xdist -o addopts="-q --import-mode=importlib --strict-markers" \
  -m "not slow and not gpu and not deepspeed and not pretrained and not slurm" "$@"
uv run coverage combine --quiet
uv run coverage report --skip-covered --sort=cover
