#!/usr/bin/env bash
# Runs all benchmarks of the model and of the dummy loss on one GPU, without network access. Prints tables and writes JSON.
#   bash tools/bench_gpu.sh [FOLDER]
# If a part fails, for example because it runs out of memory, the others still run; the script lists it and exits with 1.
# DEVICE=cpu runs the same parts with tiny sizes as a check.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
folder=${1:-benchmarks}
mkdir -p "$folder" || exit
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
failed=()
run() {
  printf '\n== %s\n' "$*"
  ${PYTHON:-uv run --no-sync python} "$@" || failed+=("$*")
}
finish() {
  ((${#failed[@]})) || exit 0
  printf '\nfailed:\n' >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
}

if [ "${DEVICE:-cuda}" = cpu ]; then
  run tools/bench_patch_embed.py --image-size 32 --patch-size 8 --width 64 --repeats 1 --threads 1 --json "$folder/patch_embed.json"
  run tools/bench_step.py --size tiny --batch-size 2 --pool 4 --repeats 1 --threads 1 --json "$folder/step.json"
  run tools/bench_dummy_loss.py --device cpu --pairs 1 --batch-size 1
  finish
fi
run tools/bench_patch_embed.py --device cuda --batch-size 32 --repeats 20 --json "$folder/patch_embed.json"
for batch_size in 8 32 64; do
  run tools/bench_step.py --device cuda --size 0.5b --sections T1 --batch-size "$batch_size" --repeats 10 \
    --json "$folder/step-T1-$batch_size.json"
done
for batch_size in 4 16; do
  run tools/bench_step.py --device cuda --size 0.5b --sections rsfMRI --batch-size "$batch_size" --repeats 10 \
    --json "$folder/step-rsfMRI-$batch_size.json"
done
run tools/bench_step.py --device cuda --size 0.5b --sections mixed logits --pool 64 --json "$folder/step-mixed.json"
for dtype in float32 bfloat16; do
  run tools/bench_dummy_loss.py --device cuda --size 0.5b --dtype "$dtype" --batch-size 32 --pairs 30 \
    > >(tee "$folder/dummy_loss-$dtype.txt")
done
finish
