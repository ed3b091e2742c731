#!/usr/bin/env bash
# Builds the three wheels and imports each in a new environment outside the workspace, with only its dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in data model train; do
  uv build --quiet --wheel --package "umbrella-$name" --out-dir "$scratch/wheels"
done
# Use the workspace's pins, so that new releases of dependencies do not break this check.
uv run --no-sync python - "$scratch/constraints.txt" <<'PYTHON'
import sys, tomllib
from pathlib import Path

pins = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
Path(sys.argv[1]).write_text("\n".join(pins))
PYTHON
cd "$scratch"
# A published package requires exactly its own version of the others.
python3 - <<'PYTHON'
import re, zipfile
from pathlib import Path

for wheel in sorted(Path("wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as files:
        (metadata,) = [files.read(name).decode() for name in files.namelist() if name.endswith(".dist-info/METADATA")]
    version = re.findall(r"^Version: (.+)$", metadata, re.MULTILINE)[0]
    needs = re.findall(r"^Requires-Dist: umbrella-(\w+)(?:\[[\w,]+\])?(.*)$", metadata, re.MULTILINE)
    expected = [(name, f"=={version}") for name in ("data", "model")] if "train" in wheel.name else []
    assert needs == expected, f"{wheel.name} requires {needs}, not {expected}"
PYTHON
for name in data model train; do
  uv venv --quiet "env-$name"
  uv pip install --quiet --python "env-$name" --constraint constraints.txt --find-links wheels "umbrella-$name"
  "env-$name/bin/python" - "$name" <<'PYTHON'
import importlib, importlib.metadata, importlib.util, sys

name = sys.argv[1]
package = importlib.import_module(f"umbrella_{name}")
assert "site-packages" in package.__file__, package.__file__
for public in package.__all__:
    getattr(package, public)
others = {"data": {"model", "train"}, "model": {"data", "train"}, "train": set()}[name]
for other in others:
    assert importlib.util.find_spec(f"umbrella_{other}") is None, f"umbrella-{name} installed umbrella-{other}"
files = [str(path) for path in importlib.metadata.files(f"umbrella-{name}")]
needed = [f"umbrella_{name}/py.typed"]
if name == "data":
    needed += [f"umbrella_data/viewer/{file}" for file in ("niivue.umd.js", "viewer.js", "LICENSE.niivue.txt")]
if name == "train":
    needed += [f"umbrella_train/app/{file}" for file in ("app.js", "app.css")]
    needed += [f"umbrella_train/templates/{page}.html.j2" for page in ("app", "app_scan", "report")]
for file in needed:
    assert file in files, f"{file} is missing"
print(f"umbrella-{name}: {len(package.__all__)} public names")
PYTHON
done
env-data/bin/umbrella-data --help >/dev/null
for command in umbrella-train umbrella-eval umbrella-report umbrella-predict umbrella-app; do env-train/bin/$command --help >/dev/null; done
