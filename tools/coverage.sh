#!/usr/bin/env bash
# Runs the tests with coverage, also of the processes that they start; fails below `fail_under` of pyproject.toml.
# Arguments are pytest's. Not part of .ci/run: with Python 3.11 the tests take about 40 % more CPU time under coverage.
set -euo pipefail
cd "$(dirname "$0")/.."
uv run coverage erase
uv run coverage run -m pytest "$@"
uv run coverage combine --quiet
uv run coverage report
