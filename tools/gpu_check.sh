#!/usr/bin/env bash
# Checks and measures on one GPU, without network, in less than 9 minutes.
#   bash tools/gpu_check.sh prepare [WHEELS]   with network: downloads wheels (Python 3.12, Linux on x86-64) of what is
#                                              missing next to torch, transformers and accelerate; default .gpu-wheels
#   bash tools/gpu_check.sh run [OUT]          on the GPU machine: the tests on one GPU, then benchmarks of the 0.5B
#                                              architecture; default $OUT, or gpu-check
#   bash tools/gpu_check.sh dry-run [OUT]      with network: both on a CPU, in a new environment as on that machine
# `run` uses $PYTHON (default python3); if that lacks a module, it installs $WHEELS (default .gpu-wheels) in a temporary
# folder. The parts come in order of importance, each with a time limit, and write their results at once: OUT/log.txt,
# OUT/figures.jsonl (a figure per line), OUT/parts.jsonl (exit status and seconds of each part) and OUT/environment.json
# (set COMMIT if the copy of the repository has no history). The check ends after $TOTAL_SECONDS (default 530). If a part
# fails, the others still run; the script lists it and exits with 1. DEVICE=cpu runs the same programs with tiny sizes
# and without limits for parts, as a busy machine can be slow.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# Left out, as no part imports them: scipy, matplotlib, wandb and dipy, which are large, and indexed-gzip and isal.
with_dependencies=(nibabel pydantic lazy-loader tyro pytest pytest-timeout)
# All of their dependencies are numpy, or come with torch, transformers and accelerate.
alone=(monai peft)
modules=(nibabel pydantic lazy_loader tyro pytest pytest_timeout monai peft)
max_bytes=60000000
model_tests=packages/umbrella-model/tests/test_attention.py

# Reads names; the workspace's pins apply.
resolve() {
  uv pip compile --quiet --no-header --no-annotate --python-version 3.12 --python-platform x86_64-manylinux_2_28 "$@" -
}

prepare() {
  set -e
  local wheels=$1 list
  list=$(mktemp)
  mkdir -p "$wheels"
  printf '%s\n' "${with_dependencies[@]}" | resolve | grep -v '^numpy==' >"$list"
  printf '%s\n' "${alone[@]}" | resolve --no-deps >>"$list"
  rm -f "$wheels"/*.whl
  local platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  uv run --isolated --no-project --with pip python -m pip download --quiet --no-deps --only-binary :all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$wheels" --requirement "$list"
  local bytes
  bytes=$(cat "$wheels"/*.whl | wc -c)
  printf '%d wheels, %d kB: %s\n' "$(wc -l <"$list")" $((bytes / 1000)) "$wheels"
  rm "$list"
  if ((bytes > max_bytes)); then
    echo "$wheels: more than $max_bytes bytes; leave out what no part of the check imports" >&2
    exit 1
  fi
}

lacks_modules() {
  ! "$python" - "${modules[@]}" <<'PYTHON'
import sys
from importlib.util import find_spec

sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))
PYTHON
}

# part NAME SECONDS ARGUMENTS...: runs Python; later parts are skipped when the time for all is used up.
part() {
  local name=$1 limit=$2 start=$SECONDS status left=$((total_seconds - SECONDS))
  if ((limit > left)) || [ "${DEVICE:-cuda}" = cpu ]; then limit=$left; fi
  printf '\n== %s (%d s)\n' "$name" "$SECONDS" | tee -a "$out/log.txt"
  if ((limit < 10)); then
    status=skipped
  else
    timeout --kill-after=10 "$limit" "$python" "${@:3}" 2>&1 | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
  fi
  printf '{"part": "%s", "status": "%s", "seconds": %d}\n' "$name" "$status" $((SECONDS - start)) >>"$out/parts.jsonl"
  [ "$status" = 0 ] || failed+=("$name: $status")
}

tests() {
  # Ranks are in sessions of their own, which `timeout` does not end: the tests end them earlier.
  GPU_CASES_SECONDS=$(($2 * 2 / 3)) part "$1" "$2" -m pytest -o addopts= --import-mode=importlib -p pytest_timeout \
    -p no:cacheprovider -v --tb=short -m gpu "${@:3}"
}

run() {
  out=$1 python=${PYTHON:-python3} failed=()
  local total_seconds=${TOTAL_SECONDS:-530}
  [ "${DEVICE:-cuda}" != cpu ] || total_seconds=${TOTAL_SECONDS:-3600}
  if [ -e "$out/parts.jsonl" ]; then
    echo "$out: has the results of another check; name another folder" >&2
    exit 2
  fi
  mkdir -p "$out" || exit
  local scratch
  scratch=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  PYTHONPATH=$(printf "$PWD/packages/umbrella-%s/src:" data model train)
  # The plugins of the machine's own pytest are left alone.
  export PYTHONPATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
  if lacks_modules; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch" \
      "${WHEELS:-.gpu-wheels}"/*.whl || { echo "$python lacks one of: ${modules[*]}; run prepare first" >&2; exit 2; }
    export PYTHONPATH=$scratch:$PYTHONPATH
  fi

  local small=() small_loss=() small_patches=()
  if [ "${DEVICE:-cuda}" = cpu ]; then
    # Later options win.
    small=(--device cpu --size tiny --batch-size 2 --pool 4 --repeats 1 --threads 1)
    small_loss=(--device cpu --size toy --dtype float32 --batch-size 1 --pairs 1)
    small_patches=(--device cpu --image-size 32 --patch-size 8 --width 64 --batch-size 2 --repeats 1 --threads 1)
  fi
  local figures=(--json "$out/figures.jsonl")
  local step=(tools/bench_step.py --device cuda --size 0.5b --repeats 8 "${figures[@]}")
  local steps=("${step[@]}" --sections T1 rsfMRI mixed --ours-only --batch-size 32 8 --pool 32 "${small[@]}")
  local compiled=("${step[@]}" --sections T1 rsfMRI --presets full --ours-only --batch-size 32 8 --compile inductor)
  # Smaller batches, as the others compute logits at all positions.
  local others=("${step[@]}" --sections T1 rsfMRI --presets full --batch-size 16 4 "${small[@]}")
  local loss=(tools/bench_dummy_loss.py --device cuda --size 0.5b --dtype bfloat16 --batch-size 32 --pairs 20)
  local patches=(tools/bench_patch_embed.py --device cuda --batch-size 32 --repeats 20)

  part environment 60 tools/gpu_environment.py "$out/environment.json"
  if [ "${DEVICE:-cuda}" = cpu ]; then
    # Without a GPU the tests are only imported: what they need must be in WHEELS.
    [ -z "$(ls "$scratch")" ] || tests "tests, imported" 60 tests/test_engines_gpu.py "$model_tests" --collect-only
    part "training steps" 60 "${steps[@]}"
    part "other implementations" 60 "${others[@]}" --compile eager
  else
    # First what tests on CPUs cannot cover, then the figures, then the pairs of settings.
    tests "NCCL, float16, inductor" 210 tests/test_engines_gpu.py "$model_tests" \
      -k "nccl or fp16 or scaler or compiled or packed_equals_padded"
    part "training steps" 150 "${steps[@]}"
    part "compiled layers" 90 "${compiled[@]}"
  fi
  part "dummy loss" 60 "${loss[@]}" "${figures[@]}" "${small_loss[@]}"
  if [ "${DEVICE:-cuda}" != cpu ]; then
    tests "pairs of settings" 120 tests/test_engines_gpu.py -k "update or hold"
    part "other implementations" 90 "${others[@]}"
  fi
  part "patch embeds" 60 "${patches[@]}" "${figures[@]}" "${small_patches[@]}"

  printf '\n%d s; results: %s\n' "$SECONDS" "$out"
  ((${#failed[@]})) || exit 0
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$out/log.txt" >&2
  exit 1
}

# The versions are those of a machine that was lent for such checks; the packages also support newer ones.
dry_run() {
  local bare
  bare=$(mktemp -d)
  uv venv --quiet --seed --python 3.12 "$bare/env" &&
    (cd "$bare" && uv pip install --quiet --python env "torch==2.11.*" "transformers==5.17.*" accelerate) &&
    bash tools/gpu_check.sh prepare "$bare/wheels" || exit
  PYTHON=$bare/env/bin/python WHEELS=$bare/wheels DEVICE=cpu bash tools/gpu_check.sh run "$1"
  local status=$?
  rm -rf "$bare"
  exit $status
}

[[ ${2:-} != -* ]] || set -- # an option, where a folder is expected
case ${1:-} in
  prepare) prepare "${2:-.gpu-wheels}" ;;
  run) run "${2:-${OUT:-gpu-check}}" ;;
  dry-run) dry_run "${2:-gpu-check}" ;;
  *) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;;
esac
