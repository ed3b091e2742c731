#!/usr/bin/env bash
# Installs the three wheels with the lowest versions of what they and their extras require, outside the workspace, whose
# pins would override these, and runs the tests whose results depend on these versions. torch keeps the workspace's pin,
# since it is large; LOWEST=all lowers it too.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in data model train; do
  uv build --quiet --wheel --package "umbrella-$name" --out-dir "$scratch/wheels"
done
python=$(uv run --no-sync python - "$scratch" <<'PYTHON'
import os, sys, tomllib
from pathlib import Path

scratch = Path(sys.argv[1])
pins = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
# uv lowers only what is required directly, and for a wheel that is the wheel: so what it requires is listed too.
lines = [f"umbrella-{wheel.name.split('-')[0].split('_')[1]} @ {wheel.as_uri()}" for wheel in scratch.glob("wheels/*.whl")]
for file in Path("packages").glob("*/pyproject.toml"):
    project = tomllib.loads(file.read_text())["project"]
    extras = {name: needs for name, needs in project.get("optional-dependencies", {}).items() if name != "deepspeed"}
    lines += [need for needs in (project["dependencies"], *extras.values()) for need in needs]
held = {"pytest", "pytest-timeout", "pytest-xdist"} | (set() if os.environ.get("LOWEST") == "all" else {"torch"})
lines += [pin for pin in pins if pin.split("==")[0] in held]
# One package's requirement of another would ask the registry for it.
(scratch / "lowest.txt").write_text("\n".join(line for line in lines if "@" in line or not line.startswith("umbrella-")))
print(sys.executable)
PYTHON
)
cd "$scratch"
uv venv --quiet --no-config --python "$python" env
uv pip install --quiet --no-config --python env --resolution lowest-direct -r lowest.txt
uv pip freeze --no-config --python env | grep -E "^(accelerate|monai|nibabel|numpy|torch|transformers)=="
env/bin/python -c "
import umbrella_data, umbrella_model, umbrella_train
for package in (umbrella_data, umbrella_model, umbrella_train):
    assert 'site-packages' in package.__file__, package.__file__"
cd "$root"
data=packages/umbrella-data/tests model=packages/umbrella-model/tests train=packages/umbrella-train/tests
# Of the command, only its help and overrides (tyro); of resuming, what needs no further process; one report.
"$scratch/env/bin/pytest" -p no:cacheprovider --disable-warnings --durations=10 \
  -k "not test_cli and not test_resume and not test_report or help or override or logged_loss or mid-epoch or all_its_parts" \
  "$data"/{test_monai.py,pipeline/test_augment.py,pipeline/test_resample.py,manifest/test_hf_export.py} \
  "$data"/scan/test_{reader,volume,voxels,header,gzip_index,diffusion}.py "$data"/preview/test_figure.py \
  "$data"/chat/test_{template,prompts,hugging_face}.py \
  "$model"/test_{modeling,generate,vision_tower,checkpoint,lora,packing,language_model}.py \
  "$train"/{test_cli.py,test_processor.py,app/test_server.py,checkpoint/test_resume.py,report/test_report.py} \
  "$train"/trainer/test_{trainer_dummy,callbacks,evaluation_loss,accumulation,trackers}.py
